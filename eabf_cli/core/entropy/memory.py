"""How much memory a measurement will take, told before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.device_memory import USABLE_SHARE, InsufficientMemoryError, MemoryParts
from eabf_cli.core.entropy.measurement import chunk_tokens

_GIB = 2**30
# torch, transformers and the tokenizer, as they lie in a process that has done nothing yet.
_PROCESS_BYTES = 2**29
# Logits of a block, what becomes of them, and a copy of the keys.
_BLOCK_BYTES = 2**26
# A value of the result: in the document's measurement, in the sums over documents, and as Python's numbers.
_RESULT_BYTES = 4 + 3 * 8 + 2 * 40


@dataclass(frozen=True, kw_only=True)
class EntropyMemory(MemoryParts):
    """Peak memory of a measurement by part, in bytes."""

    weights: int
    activations: int
    attention: int
    cache: int
    results: int
    process: int


def estimate_memory(
    config: PretrainedConfig,
    *,
    length: int,
    num_positions: int,
    dtype: torch.dtype,
    device_type: str,
    rows: bool = False,
    num_models: int = 1,
) -> EntropyMemory:
    """The peak memory of measuring one document after another.

    Args:
        config: of the model; with several (`num_models`), which are loaded in turns, of the larger one.
        length: tokens of a document.
        rows: whole distributions are kept.
    """
    model = architectures.meta_model(config)
    slides = any(layer.is_sliding for layer in architectures.attention_layers(model))
    implementation = architectures.decoder(model).config._attn_implementation
    size = chunk_tokens(config, implementation, length, slides=slides)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    item = dtype.itemsize
    fused = 4 * size * width * (2 * heads + 2 * key_heads)
    squared = 0 if size == length and implementation != "eager" and not slides else 2**28
    if size == length and (slides or implementation == "eager"):
        squared = length * length * (12 * heads if implementation == "eager" else 5)
    values = layers * heads * num_positions
    return EntropyMemory(
        weights=model.num_parameters() * item,
        # Hidden states before and after, the two halves of the MLP and their product, queries, keys, values, output.
        activations=size
        * item
        * (4 * config.hidden_size + 3 * config.intermediate_size + width * (3 * heads + 4 * key_heads)),
        attention=fused + squared + _BLOCK_BYTES,
        cache=0 if size == length else 2 * layers * key_heads * width * length * item,
        results=values * _RESULT_BYTES * (2 * num_models - 1) + (2 * 4 * values * length if rows else 0),
        process=_PROCESS_BYTES if device_type == "cpu" else 0,
    )


def refuse_too_large(estimate: EntropyMemory, available_bytes: int, *, length: int, device: str) -> None:
    """Refuse what does not fit.

    Raises:
        InsufficientMemoryError: the estimate is above the usable share of what is available.
    """
    if estimate.total <= USABLE_SHARE * available_bytes:
        return
    part = estimate.largest
    raise InsufficientMemoryError(
        f"measuring documents of {length:,} tokens needs about {_gib(estimate.total)} (most of it {part}, "
        f"{_gib(getattr(estimate, part))}), and {device} has {_gib(available_bytes)} available\n{_way_out(part)}"
    )


def _way_out(part: str) -> str:
    if part == "weights":
        return "Use --dtype bfloat16, a smaller model, or a device with more memory"
    if part == "results":
        return "Ask for fewer --positions (log:64), without --rows, or for a shorter --length"
    return "Give a shorter --length, or use a device with more memory"


def _gib(num_bytes: Any) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
