"""The attention kernel that scales the query by t(position) and hands over to the model's own kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from eabf_cli.core.architectures import attention_kernel
from eabf_cli.modeling_eabf import logit_scale

KERNEL_NAME = "eabf"
# Kernels that take nothing from the module's configuration, and so may be given the module itself.
_CONFIG_FREE = ("eager", "sdpa", "flex_attention")
# How a decoder's forward may be called without keywords, in every supported family.
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


class PassScale:
    """t of the forward pass that goes on: its layers have the same positions, and the first of them computes it.

    Only while the decoder runs, so that positions which are changed in place between two passes are not missed. It
    is for decoding, where the few small operations of a layer are as long as its attention.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._last: tuple[Tensor, torch.dtype, Tensor] | None = None

    def open(self, *hook_arguments: Any) -> None:
        """Forward pre-hook of the decoder."""
        # A graph has no use for it, and would be guarded by what it holds.
        if not torch.compiler.is_compiling():
            self._is_open = True

    def close(self, *hook_arguments: Any) -> None:
        """Forward hook of the decoder, also where it fails."""
        if not torch.compiler.is_compiling():
            self._is_open, self._last = False, None

    def factors(self, position_ids: Tensor, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives for these positions and this dtype, computed once in a pass."""
        if torch.compiler.is_compiling() or not self._is_open:
            return compute()
        last = self._last
        if last is None or last[0] is not position_ids or last[1] != dtype:
            last = self._last = (position_ids, dtype, compute())
        return last[2]


@dataclass(frozen=True, kw_only=True)
class LayerScale:
    """What a scaled attention module knows about its scale.

    `model_config` is the model's live configuration: it names the kernel to hand over to. `pass_scale` is shared by
    the model's layers.
    """

    rule: str
    original_max_position_embeddings: int
    model_config: PretrainedConfig
    pass_scale: PassScale

    def factors(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """t of each query, (batch or 1, 1, queries, 1), computed in float32 and cast last."""

        def compute() -> Tensor:
            t = logit_scale(self.rule, position_ids, self.original_max_position_embeddings)
            return t[:, None, :, None].to(dtype)

        return self.pass_scale.factors(position_ids, dtype, compute)


class _KernelView:
    """An attention module as its kernel should see it: with the model's configuration.

    Flash attention reads the name of its implementation from `module.config`.
    """

    def __init__(self, module: nn.Module, config: PretrainedConfig) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def scaled_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, queries, head_dim), after RoPE and after any query norm
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Multiply the query by t(position_ids), then call the kernel that the model's config names.

    Scaling a query scales its logits (METHOD.md section 1), whatever the kernel. t is float32 and is cast
    to the query's dtype last: in bfloat16 its logarithm would be off by up to 0.45 %.

    Raises:
        ValueError: no position ids reached the attention, so that t is not known.
    """
    scale: LayerScale = module.eabf_scale
    if position_ids is None:
        raise ValueError(
            f"{type(module).__name__} was called without position_ids, so the attention scale is not known: "
            "call the model, not its layers, or pass position_ids"
        )
    query = query * scale.factors(position_ids, query.dtype)
    return call_kernel(
        module, scale.model_config, query, key, value, attention_mask, position_ids=position_ids, **kwargs
    )


def call_kernel(
    module: nn.Module,
    config: PretrainedConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the kernel that a configuration names, for a module that may have been given another one."""
    implementation = config._attn_implementation
    seen = module if implementation in _CONFIG_FREE else _KernelView(module, config)
    return attention_kernel(module, implementation)(seen, query, key, value, attention_mask, **kwargs)


def register_kernel() -> None:
    """Make the kernel known to transformers; no stock kernel is touched, and doing it twice is harmless."""
    AttentionInterface.register(KERNEL_NAME, scaled_attention)


def derive_position_ids(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook for the decoder: without position ids, a 2D mask tells them, so that pads do not count.

    Stock models number the tokens of a left-padded row from the first pad; a relative encoding does not
    mind, an absolute logit scale does.
    """
    if len(args) > len(_POSITIONAL):
        return args, kwargs
    kwargs = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
    mask = kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
        num_queries = tokens.shape[1]
        cache = kwargs.get("past_key_values")
        num_seen = cache.get_seq_length() if cache is not None else 0
        # A mask that does not cover the cache says nothing about what came before.
        if mask.shape[1] >= num_seen + num_queries:
            positions = ((mask != 0).to(torch.long).cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, num_seen : num_seen + num_queries]
    return (), kwargs
