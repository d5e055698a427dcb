"""Which lengths are measured where none are asked for, and what a length takes, told before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.device_memory import USABLE_SHARE, InsufficientMemoryError, MemoryParts
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.scoring import MAX_LOGITS, max_chunk_tokens
from eabf_cli.core.evals.settings import EvalConfig

WINDOWS = (1 / 4, 1 / 2, 1, 2, 4, 8)
"""The lengths, in pre-trained windows."""
MAX_DEFAULT_S = 3600.0
"""On a CPU, longer lengths than take about this long are measured only if they are asked for."""

_GIB = 2**30
_LEAST_LENGTH = 16
# torch, transformers and the tokenizer, as they lie in a process that has done nothing yet.
_PROCESS_BYTES = 2**29
# Logits, their softmax, and what becomes of both.
_LOGITS_BYTES = 4 * 4 * MAX_LOGITS
# Multiplications and additions in float32 of one thread in a second, as they come out of such a model.
_OPERATIONS_PER_THREAD = 8e10


@dataclass(frozen=True, kw_only=True)
class EvalMemory(MemoryParts):
    """Peak memory of an evaluation by part, in bytes."""

    weights: int
    cache: int
    activations: int
    attention: int
    logits: int
    process: int


def estimate_memory(
    shape: PreTrainedModel,
    *,
    length: int,
    follows_length: bool,
    batch_tokens: int,
    dtype: torch.dtype,
    device_type: str,
) -> EvalMemory:
    """The peak memory of measuring at a length, in tokens.

    Args:
        shape: the model without its weights (on the meta device).
        follows_length: its method's frequencies follow the length of a call, so that rows are read in one piece.
        batch_tokens: tokens in a forward pass of several rows.
    """
    config = architectures.decoder(shape).config
    heads, layers, item = config.num_attention_heads, config.num_hidden_layers, dtype.itemsize
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    chunk = length if follows_length else max_chunk_tokens(config, length)
    is_eager = config._attn_implementation == "eager"
    # Of rows side by side none is longer than a batch; the eager kernel has them as short as a chunk.
    at_once = max(chunk, length if follows_length else min(length, chunk if is_eager else batch_tokens))
    square = chunk * length * (5 + (12 * heads if is_eager else 0)) if chunk < length or is_eager else 0
    return EvalMemory(
        weights=shape.num_parameters() * item,
        cache=0 if follows_length else 2 * layers * key_heads * width * length * item,
        # Hidden states before and after, the halves of the MLP and their product, queries, keys, values, output.
        activations=at_once
        * item
        * (4 * config.hidden_size + 3 * config.intermediate_size + width * (3 * heads + 4 * key_heads)),
        # Keys and values repeated for every head, and what grows with the product of chunk and length.
        attention=2 * heads * width * length * item + square,
        logits=_LOGITS_BYTES,
        process=_PROCESS_BYTES if device_type == "cpu" else 0,
    )


def estimate_seconds(
    shape: PreTrainedModel, lengths: Sequence[int], evaluation: EvalConfig, *, num_threads: int
) -> float:
    """Roughly how long an evaluation takes on a CPU: arithmetic alone, shared beginnings taken off."""
    config = architectures.decoder(shape).config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    num_parameters = shape.num_parameters()
    rows = {
        "context_gain": evaluation.num_documents,
        # A passkey prompt is read from its depth on.
        "passkey": evaluation.num_passkey_trials / 2,
        "needles": evaluation.num_needle_prompts,
        "multi_key": evaluation.num_multi_key_texts,
        "variable_tracking": evaluation.num_tracking_prompts,
        "repeated_span": evaluation.num_span_prompts,
    }
    num_rows = sum(count for task, count in rows.items() if task in evaluation.tasks)

    def row(length: int) -> float:
        return length * 2 * num_parameters + 2 * length**2 * config.num_hidden_layers * heads * width

    operations = num_rows * sum(map(row, lengths))
    if "context_gain" not in evaluation.tasks and {"perplexity", "perplexity_by_position"} & set(evaluation.tasks):
        # The shorter lengths are the beginnings of the longest.
        operations += evaluation.num_documents * row(max(lengths))
    return operations / (_OPERATIONS_PER_THREAD * num_threads)


def choose_lengths(
    window: int, *, fits: Callable[[int], bool], takes_s: Callable[[Sequence[int]], float], dtype: torch.dtype
) -> tuple[tuple[int, ...], str]:
    """The lengths where none are asked for: 1/4 to 8 pre-trained windows, as far as memory and time allow.

    Args:
        window: the pre-trained window, in tokens.
        fits: whether a length fits into memory.
        takes_s: how long some lengths take, in seconds; 0 where time is no matter.
        dtype: that the model runs in.

    Returns:
        the lengths, and a sentence about them.

    Raises:
        InsufficientMemoryError: not even the shortest fits.
    """
    wanted = [round(share * window) for share in WINDOWS if round(share * window) >= _LEAST_LENGTH]
    if not wanted:
        raise InvalidConfigError(f"a window of {window} tokens is too small to choose lengths from: give --lengths")
    chosen = [length for length in wanted if fits(length)]
    if not chosen:
        raise InsufficientMemoryError(
            f"there is not enough memory to measure at {wanted[0]:,} tokens, the shortest length: {ways_to_fit(dtype)}"
        )
    reason = "memory" if len(chosen) < len(wanted) else ""
    # Up to the window itself, whatever it takes.
    while takes_s(chosen) > MAX_DEFAULT_S and chosen[-1] > window:
        chosen.pop()
        reason = "time"
    times = "" if chosen[-1] == window else f"{chosen[-1] / window:g} times "
    note = f"lengths from {chosen[0]:,} to {chosen[-1]:,} tokens, {times}the pre-trained window"
    if reason == "memory":
        note += f" ({wanted[len(chosen)]:,} would not fit into memory)"
    elif reason == "time":
        hours = takes_s(wanted[: len(chosen) + 1]) / 3600
        note += f" (with {wanted[len(chosen)]:,} it would take about {hours:.1f} hours here: --lengths asks for more)"
    return tuple(chosen), note


def refuse_too_long(
    lengths: Sequence[int],
    estimate: Callable[[int], EvalMemory],
    available_bytes: int,
    *,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Refuse lengths that do not fit, before anything is loaded.

    Args:
        dtype: that the model runs in.

    Raises:
        InsufficientMemoryError: the longest is above the usable share of what is available.
    """
    longest = max(lengths)
    needed = estimate(longest)
    if fits_memory(needed, available_bytes):
        return
    shorter = longest
    while shorter > _LEAST_LENGTH and not fits_memory(estimate(shorter), available_bytes):
        shorter //= 2
    fitting = fits_memory(estimate(shorter), available_bytes)
    way_out = f"Lengths up to about {shorter:,} fit" if fitting else "No length fits"
    halves = "--dtype bfloat16 nearly halves it, and " if _can_halve(dtype) else ""
    raise InsufficientMemoryError(
        f"measuring at {longest:,} tokens needs about {_gib(needed.total)} (most of it {needed.largest}, "
        f"{_gib(getattr(needed, needed.largest))}), and {device} has {_gib(available_bytes)} available\n"
        f"{way_out}; {halves}another --device may have more"
    )


def ways_to_fit(dtype: torch.dtype) -> str:
    """What makes an evaluation smaller, for a model that runs in a dtype."""
    return f"give shorter --lengths, {'--dtype bfloat16, ' if _can_halve(dtype) else ''}or another --device"


def _can_halve(dtype: torch.dtype) -> bool:
    return dtype.itemsize > torch.bfloat16.itemsize


def fits_memory(memory: EvalMemory, available_bytes: int) -> bool:
    """Whether an evaluation fits into the usable share of the available memory."""
    return memory.total <= USABLE_SHARE * available_bytes


def _gib(num_bytes: Any) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
