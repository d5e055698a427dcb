"""One document through a model, with the entropy of its attention on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.entropy.probe import probed
from eabf_cli.core.entropy.recorder import MeasuredShape, Recorder

# What the largest tensor of one layer's attention may take where it grows with the square of the length.
_CHUNK_BYTES = 2**28


def measure_document(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    scores: bool = False,
    rows: bool = False,
    chunk_tokens: int | None = None,
    name: str = "the document",
) -> Recorder:
    """Run a document through a model, patched or not, and measure its attention.

    The forward pass is the model's own, up to the last layer: no logits are computed. The model is as it was
    afterwards.

    Args:
        input_ids: `(batch, length)`.
        positions: of the queries to measure, 1-based columns of `input_ids`, ascending.
        attention_mask: `(batch, length)`, 0 where a row is padded (on the left); what queries of the padding give
            means nothing.
        scores: also measure where attention goes (rows without padding).
        rows: also keep the distributions themselves.
        chunk_tokens: tokens in one forward pass, those before it being in a cache; None chooses (`chunk_size`).
        name: what error messages call the document.

    Returns:
        what was measured, on the CPU.

    Raises:
        NotANumberError: an entropy is NaN.
        InvalidConfigError: the model runs on flex attention.
    """
    decoder = architectures.decoder(model)
    device = decoder.get_input_embeddings().weight.device
    batch, length = input_ids.shape
    config = decoder.config
    shape = MeasuredShape(
        batch=batch, num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads, length=length
    )
    recorder = Recorder(shape, positions, scores=scores, rows=rows, name=name)
    size = chunk_tokens or chunk_size(model, length, batch=batch)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if architectures.follows_length(config):
                # Its frequencies keep to the longest call so far until a short one comes.
                decoder(input_ids=input_ids[:1, :1].to(device), use_cache=False)
            with probed(model, recorder):
                _prefill(decoder, input_ids.to(device), attention_mask, size, recorder)
    finally:
        model.train(was_training)
    return recorder


def _prefill(
    decoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, size: int, recorder: Recorder
) -> None:
    length = input_ids.shape[1]
    cache = DynamicCache(config=decoder.config) if size < length else None
    mask = None if attention_mask is None else attention_mask.to(input_ids.device)
    for start in range(0, length, size):
        recorder.start, end = start, min(start + size, length)
        decoder(
            input_ids=input_ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=cache is not None,
        )


def chunk_size(model: PreTrainedModel, length: int, *, batch: int = 1) -> int:
    """Tokens in one forward pass: all, unless something in it grows with the square of the length.

    That is the attention of the eager kernel (soft-capping has no other here), and the mask of layers that slide.
    """
    config = architectures.decoder(model).config
    slides = any(layer.is_sliding for layer in architectures.attention_layers(model))
    return chunk_tokens(config, config._attn_implementation, length, slides=slides, batch=batch)


def chunk_tokens(
    config: PretrainedConfig, attn_implementation: str, length: int, *, slides: bool, batch: int = 1
) -> int:
    """`chunk_size` of a model that is not loaded yet."""
    if architectures.follows_length(config) or not (attn_implementation == "eager" or slides):
        return length
    # Logits, float32 probabilities and their copy; or a mask of booleans with its float32 copy.
    per_pair = 12 * config.num_attention_heads if attn_implementation == "eager" else 5
    return max(1, min(length, _CHUNK_BYTES // (per_pair * batch * length)))
