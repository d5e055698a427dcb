"""The model that a written checkpoint is held to: its source in this process, with the method that it should carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import has_tokenizer, load_model, load_tokenizer, read_config
from eabf_cli.core.device_memory import USABLE_SHARE, available_memory
from eabf_cli.core.devices import choose_device
from eabf_cli.core.export.clean_reload import compute_logits, describe_tokenizer, hash_tensor, rotary_frequencies
from eabf_cli.core.export.comparison import Observation
from eabf_cli.core.export.rows import Rows, choose_rows
from eabf_cli.core.patching import apply_method, describe_patch, remove_method
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource

# Beside the tokens of the vocabulary, text as people write it, in several scripts.
_TEXT = (
    "The pass key is 12345. Remember it!\n\n\tdef f(x):\n\t    return x ** 2  # a tab, four spaces\r\n"
    "Größe, naïve, São Paulo, Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी, 🙂👍🏽 1,234.56 €  \u00a0end"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the reloaded checkpoint is compared with.

    Attributes:
        observation: the reference, measured.
        scaled_layers: layers whose logits are scaled by position.
        rows: the rows of tokens that it was measured on.
        positions: 1-based, where the logit scale is to be measured: inside the window, beyond it, at the end.
        text: what the tokenizer was measured on; None without a tokenizer.
        compute_dtype: in which the logits were computed.
        device: where, as torch writes it.
        notes: what could not be compared, and why.
    """

    observation: Observation
    scaled_layers: tuple[int, ...]
    rows: Rows
    positions: list[int]
    text: str | None
    compute_dtype: torch.dtype
    device: str
    notes: tuple[str, ...] = ()


def expected_scaling(source: ModelSource, scaling: RopeScalingConfig | None) -> RopeScalingConfig | None:
    """The method that a checkpoint of a source should carry, resolved: a given one, else the source's own."""
    loaded = read_config(source)
    if scaling is not None:
        return resolve_scaling(loaded.config, scaling, rebase=True).scaling
    return loaded.resolution.scaling if loaded.resolution is not None else None


def measure_reference(
    source: ModelSource,
    scaling: RopeScalingConfig | None,
    dtype: torch.dtype,
    *,
    tokenizer: ModelSource,
    trust_remote_code: bool,
    device: str,
    seed: int,
) -> Reference:
    """Load a source and measure it; the model is gone from memory afterwards.

    Args:
        scaling: the method to put in the place of the source's own; None keeps that.
        dtype: to which the weights are rounded, once, before anything is computed.
        tokenizer: the model whose tokenizer the checkpoint has.
        trust_remote_code: let the tokenizer's own code run.
        device: as for `load_model`.
        seed: of the tokens.
    """
    loaded = read_config(source)
    num_parameters = architectures.meta_model(loaded.config).num_parameters()
    chosen = choose_device(device)
    compute_dtype = torch.float32
    notes: tuple[str, ...] = ()
    if dtype.itemsize < 4 and 4 * num_parameters > USABLE_SHARE * available_memory(chosen):
        compute_dtype = dtype
        notes = (f"computed in {_name(dtype)}: in float32 the model does not fit in the memory of {chosen}",)
    model = load_model(
        source.name,
        revision=source.revision,
        dtype=_name(compute_dtype),
        device=device,
    )
    try:
        if scaling is not None:
            if describe_patch(model) is not None:
                remove_method(model)
            apply_method(model, scaling, rebase=True)
        carried = describe_patch(model)
        window, target = _windows(model, carried)
        rows = choose_rows(loaded.config, num_parameters, window, target, device_type=model.device.type, seed=seed)
        weights = _round_weights(model, dtype, compute_dtype)
        frequencies = rotary_frequencies(model)
        described, text = _read_tokenizer(
            tokenizer, target if carried is not None else None, trust_remote_code=trust_remote_code
        )
        observation = Observation(
            logits=compute_logits(model, rows.tensors),
            frequencies=frequencies,
            weights=weights,
            max_position_embeddings=architectures.decoder(model).config.max_position_embeddings,
            tokenizer=described,
        )
        return Reference(
            observation=observation,
            scaled_layers=_scaled_layers(model, carried),
            rows=rows,
            positions=sorted({window, min(2 * window, (window + target) // 2), target}),
            text=text,
            compute_dtype=compute_dtype,
            device=str(model.device),
            notes=(*rows.notes, *notes),
        )
    finally:
        # The clean process needs the room, and a patched model is a circle of references, which lives on for a while.
        model.to("meta")
        if chosen.type == "cuda":
            torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _windows(model: PreTrainedModel, scaling: RopeScalingConfig | None) -> tuple[int, int]:
    if scaling is None or scaling.original_max_position_embeddings is None:
        window = architectures.decoder(model).config.max_position_embeddings
        return window, window
    return scaling.original_max_position_embeddings, scaling.max_position_embeddings


def _scaled_layers(model: PreTrainedModel, scaling: RopeScalingConfig | None) -> tuple[int, ...]:
    if scaling is None or scaling.entry.logit_scale is None:
        return ()
    exempt = scaling.unscaled_layers or ()
    layers = architectures.attention_layers(model)
    return tuple(layer.index for layer in layers if layer.can_scale and layer.index not in exempt)


@torch.no_grad()
def _round_weights(model: PreTrainedModel, dtype: torch.dtype, compute_dtype: torch.dtype) -> dict[str, str]:
    """Round every weight to the checkpoint's dtype, in place, and hash it there."""
    hashes = {}
    for name, weight in model.named_parameters():
        rounded = weight.data.to(dtype)
        hashes[name] = hash_tensor(rounded)
        weight.data = rounded.to(compute_dtype)
    return hashes


def _read_tokenizer(
    source: ModelSource, window: int | None, *, trust_remote_code: bool
) -> tuple[dict[str, Any] | None, str | None]:
    model = source.base or source
    if model.gguf_file is None and not has_tokenizer(model.folder):
        return None, None
    tokenizer = load_tokenizer(source.name, revision=source.revision, trust_remote_code=trust_remote_code)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # Every token of the vocabulary once, so that no rule of the tokenizer goes unused.
    text = _TEXT + tokenizer.convert_tokens_to_string([token for token in tokens if token is not None])
    described = describe_tokenizer(tokenizer, text)
    if window is not None:
        described["model_max_length"] = window
    return described, text
