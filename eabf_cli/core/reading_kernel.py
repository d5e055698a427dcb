"""The attention of a chunk of tokens behind a cache, on a CPU as fast as that of a whole prompt.

A chunk sees all of the cache and, causally, itself. torch's attention has no word for that but a mask, with which it
is slower, and computes what the mask hides. Here the two parts are computed apart, neither with a mask, and put
together by their normalisers: with Z the sum of exp(logits) of a part and o its output,
(Z1 o1 + Z2 o2) / (Z1 + Z2) is the attention over both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from eabf_cli.core import architectures

KERNEL_NAME = "eabf_reading"
# The only kernel of a CPU that returns the normaliser.
_FUSED_CPU = "_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def reading_kernel(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that uses torch's attention on a CPU read chunks behind a cache at full speed in this block.

    Its results are the same but for rounding. Other models stay as they are.
    """
    config = architectures.decoder(model).config
    device = next(model.parameters()).device.type
    if config._attn_implementation != "sdpa" or device != "cpu" or not hasattr(torch.ops.aten, _FUSED_CPU):
        yield
        return
    AttentionInterface.register(KERNEL_NAME, _attention)
    AttentionMaskInterface.register(KERNEL_NAME, _mask)
    config._attn_implementation = KERNEL_NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """No mask where the last query stands at the last key and sees every key; else torch's, which is never left out:

    torch leaves it out for the first tokens of a static cache, too, whose first query stands at the first key.
    """
    if allow_is_causal_skip and attention_mask is None and local_size is None and kv_length == q_offset + q_length:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, queries, head_dim)
    key: Tensor,  # (batch, key-value heads, keys, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose last query stands at the last key, unless a mask says otherwise."""
    num_queries, num_before = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is not None or num_queries == 1 or num_before == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if key.shape[-1] != value.shape[-1]:
        causal = torch.ones(num_queries, key.shape[2], dtype=torch.bool).tril(num_before)[None, None]
        return sdpa_attention_forward(module, query, key, value, causal, scaling=scaling, **kwargs)
    kernel = getattr(torch.ops.aten, _FUSED_CPU)
    # Outputs (batch, heads, queries, head_dim), logarithms of the normalisers (batch, heads, queries).
    before, log_before = kernel(query, key[:, :, :num_before], value[:, :, :num_before], 0.0, False, scale=scaling)
    own, log_own = kernel(query, key[:, :, num_before:], value[:, :, num_before:], 0.0, True, scale=scaling)
    share = torch.sigmoid(log_before - log_own)[..., None].to(own.dtype)
    return torch.lerp(own, before, share).transpose(1, 2).contiguous(), None
