"""The rows of tokens on which two models are compared, within what a device computes in a minute or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

# Floating-point operations that a comparison may take on a device; a row beyond that is left out.
_AFFORDABLE = {"cpu": 1e13, "mps": 1e14, "cuda": 1e15}
_SPREAD_TOKENS = 512
# Places of a row at which logits are compared: a vocabulary times all places of a long row would not fit.
_PLACES = 128
# How far a row goes beyond the original window at the least.
_BEYOND = 64
_SHORTEST = 16


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows in the form of `clean_reload.compute_logits`.

    Attributes:
        tensors: the rows.
        lengths: of those whose positions are 0, 1, 2, ...
        spread_to: the last position of the row whose positions are spread over the whole window.
        notes: what was left out.
    """

    tensors: dict[str, torch.Tensor]
    lengths: tuple[int, ...]
    spread_to: int
    notes: tuple[str, ...]


def choose_rows(
    config: PretrainedConfig, num_parameters: int, window: int, target: int, *, device_type: str, seed: int
) -> Rows:
    """Rows inside and beyond the original window.

    Whole rows end inside the window, a little beyond it, and at the target or four windows. One row more has its few
    tokens spread over all positions up to the target, which reaches the end where a whole row would take too long.

    Args:
        config: the plain model's.
        window: the original window, in tokens.
        target: the extended one.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = sorted({max(window // 2, 2), min(window + _BEYOND, target), min(4 * window, target)})
    budget = _AFFORDABLE.get(device_type, _AFFORDABLE["cpu"])
    lengths = [length for length in wanted if _operations(config, num_parameters, length) <= budget]
    notes = []
    if lengths != wanted:
        left_out = [length for length in wanted if length not in lengths]
        notes.append(
            f"rows of {', '.join(f'{length:,}' for length in left_out)} tokens were left out: too long for "
            f"{num_parameters / 1e9:.1f} billion weights on {device_type}"
        )
    if not lengths:
        length = wanted[0]
        while length > _SHORTEST and _operations(config, num_parameters, length) > budget:
            length //= 2
        lengths = [length]
    tensors = {}
    for length in lengths:
        tensors[f"whole{length}.input_ids"] = _tokens(config, length, generator)
        tensors[f"whole{length}.keep"] = _places(length, generator)
    positions = _spread(window, target, generator)
    tensors["spread.input_ids"] = _tokens(config, len(positions), generator)
    tensors["spread.position_ids"] = positions[None]
    tensors["spread.keep"] = _places(len(positions), generator)
    return Rows(tensors=tensors, lengths=tuple(lengths), spread_to=int(positions[-1]), notes=tuple(notes))


def _operations(config: PretrainedConfig, num_parameters: int, length: int) -> float:
    """Floating-point operations of a forward pass: of the weights, and of causal attention."""
    return 2.0 * num_parameters * length + 2.0 * config.num_hidden_layers * config.hidden_size * length**2


def _tokens(config: PretrainedConfig, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(config.vocab_size, (1, length), generator=generator)


def _spread(window: int, target: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted positions from 0 to the last of the target, with those beside the window's end."""
    fixed = torch.tensor([0, window - 1, min(window, target - 1), target - 1])
    others = torch.randint(target, (_SPREAD_TOKENS,), generator=generator)
    return torch.cat([fixed, others]).unique()


def _places(length: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted places of a row, with its first and last one."""
    others = torch.randint(length, (_PLACES,), generator=generator)
    return torch.cat([torch.tensor([0, length - 1]), others]).unique()
