"""Looking into the attention of one model instance while it runs, and letting go of it without a trace.

Every attention module is given, for the time, a copy of the configuration that names a kernel of ours. That kernel
shows queries, keys and mask to the recorder and then calls the one that the model's own configuration names, so that
the forward pass is what it would have been. In a patched model (`eabf_cli.core.attention_scale`) it comes behind the
logit scale, and sees the scaled query.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.attention_scale import call_kernel
from eabf_cli.core.entropy.kernels import LogitRule
from eabf_cli.core.entropy.recorder import Recorder
from eabf_cli.core.errors import InvalidConfigError

KERNEL_NAME = "eabf_entropy"


@dataclass(frozen=True, kw_only=True)
class _LayerProbe:
    """What an attention module knows while it is looked into; `config` names the kernel to hand over to."""

    index: int
    module: nn.Module
    config: PretrainedConfig
    recorder: Recorder


@contextmanager
def probed(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Show the recorder every attention of this model while the block runs.

    Raises:
        InvalidConfigError: the model runs on flex attention, whose masks cannot be looked into.
    """
    config = architectures.decoder(model).config
    if config._attn_implementation == "flex_attention":
        raise InvalidConfigError(
            "attention entropy cannot be measured under flex_attention: model.set_attn_implementation('sdpa') first"
        )
    AttentionInterface.register(KERNEL_NAME, _probed_attention)
    naming = copy.copy(config)
    naming._attn_implementation = KERNEL_NAME
    layers = architectures.attention_layers(model)
    before = [(layer.module, layer.module.config, getattr(layer.module, "eabf_scale", None)) for layer in layers]
    try:
        for layer in layers:
            module = layer.module
            module.entropy_probe = _LayerProbe(index=layer.index, module=module, config=config, recorder=recorder)
            if hasattr(module, "eabf_scale"):
                module.eabf_scale = replace(module.eabf_scale, model_config=naming)
            else:
                module.config = naming
        yield
    finally:
        for module, module_config, scale in before:
            module.config = module_config
            if scale is not None:
                module.eabf_scale = scale
            if hasattr(module, "entropy_probe"):
                del module.entropy_probe


def _probed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    probe: _LayerProbe = module.entropy_probe
    scaling = kwargs.get("scaling")
    rule = LogitRule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        sliding_window=kwargs.get("sliding_window"),
    )
    probe.recorder.record(probe.index, query, key, attention_mask, rule)
    return call_kernel(probe.module, probe.config, query, key, value, attention_mask, **kwargs)
