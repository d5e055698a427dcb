"""Applying a method to a loaded model, on that instance only, and taking it off again.

Frequencies change by giving the model a rotary embedding of its own class for the new parameters. The
logit scale sits in transformers' attention interface: every scaled attention module gets a copy of the
configuration that names the kernel `eabf`, which multiplies the query by t(position) and hands over to
the kernel that the model's own configuration names. That configuration keeps the true name, so masks,
`set_attn_implementation`, `output_attentions` and the trainer see a stock model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.attention_scale import (
    KERNEL_NAME,
    LayerScale,
    PassScale,
    derive_position_ids,
    register_kernel,
)
from eabf_cli.core.errors import AlreadyScaledError, InvalidConfigError, UnsupportedModelError
from eabf_cli.core.report import PatchReport, plan_patch
from eabf_cli.core.resolution import Resolution, resolve_scaling, scaled_config
from eabf_cli.core.saving import save_patched
from eabf_cli.core.scaling_config import RopeScalingConfig

_STATE = "_eabf_patch"


@dataclass(kw_only=True)
class PatchState:
    """What a patched model needs to be saved and restored; kept on the model itself."""

    resolution: Resolution
    original_config: PretrainedConfig
    original_rotary: nn.Module
    hooks: list[RemovableHandle]


def apply_eabf(
    model: PreTrainedModel,
    factor: float = 4.0,
    *,
    rope_theta: float | str = 500_000.0,
    original_max_position_embeddings: int | None = None,
    unscaled_layers: tuple[int, ...] | None = (0, 1),
) -> PatchReport:
    """Apply Entropy-Aware ABF (arXiv 2401.07004, section 3) to this model instance.

    Args:
        model: a loaded transformers model of a supported architecture.
        factor: target window divided by the pre-trained window.
        rope_theta: the new base frequency; the published 500,000 unless the model's own is larger.
        original_max_position_embeddings: the pre-trained window c; the model's own field by default.
        unscaled_layers: layers whose logits are left alone, (0, 1) in the paper.

    Returns:
        what changed; `remove_method(model)` undoes it.

    Raises:
        UnsupportedModelError, AlreadyScaledError, InvalidConfigError: see `apply_method`.
    """
    return apply_method(
        model,
        RopeScalingConfig(
            method="eabf",
            factor=factor,
            # The published base stands for the rule "paper", which never goes below the model's own.
            rope_theta="paper" if rope_theta == 500_000.0 else rope_theta,
            original_max_position_embeddings=original_max_position_embeddings,
            unscaled_layers=unscaled_layers,
        ),
    )


def apply_method(
    model: PreTrainedModel, config: RopeScalingConfig | Mapping[str, Any], *, rebase: bool = False
) -> PatchReport:
    """Extend this model instance's window by a method of the table.

    Args:
        model: a loaded transformers model of a supported architecture.
        config: the method and its numbers, or the same as a `rope_scaling` dictionary.
        rebase: take an existing scaling (llama3, yarn, linear, ...) off first instead of refusing it.

    Returns:
        what changed; `remove_method(model)` undoes it.

    Raises:
        UnsupportedModelError: an architecture outside the supported list, or no layer to extend.
        AlreadyScaledError: the model is scaled, or was patched before.
        InvalidConfigError: numbers that make no sense for this model.
    """
    scaling = config if isinstance(config, RopeScalingConfig) else RopeScalingConfig.from_dict(config)
    model = _unwrapped(model)
    if describe_patch(model) is not None:
        raise AlreadyScaledError(
            f"the model was patched before ({describe_patch(model)}): remove_method(model) takes that off"
        )
    return apply_resolution(model, resolve_scaling(architectures.decoder(model).config, scaling, rebase=rebase))


def apply_resolution(model: PreTrainedModel, resolution: Resolution) -> PatchReport:
    """Apply a scaling whose numbers are known already (see `apply_method`)."""
    report = plan_patch(model, resolution)
    original_config = architectures.decoder(model).config
    new_config = scaled_config(resolution.base_config, resolution.scaling)
    new_config._attn_implementation = original_config._attn_implementation
    new_config._experts_implementation = original_config._experts_implementation
    rotary = architectures.build_rotary_embedding(model, new_config)

    # Nothing on the model changes above this line, so that a refusal leaves it as it was.
    base = architectures.decoder(model)
    state = PatchState(
        resolution=resolution,
        original_config=original_config,
        original_rotary=base.rotary_emb,
        hooks=[base.register_forward_pre_hook(derive_position_ids, with_kwargs=True)],
    )
    _swap_config(model, original_config, new_config)
    base.rotary_emb = rotary
    if resolution.scaling.entry.logit_scale is not None:
        register_kernel()
        pass_scale = PassScale()
        state.hooks.append(base.register_forward_pre_hook(pass_scale.open))
        state.hooks.append(base.register_forward_hook(pass_scale.close, always_call=True))
        attention_config = copy.copy(new_config)
        attention_config._attn_implementation = KERNEL_NAME
        for layer in architectures.attention_layers(model):
            if layer.index not in report.scaled_layers:
                continue
            layer.module.config = attention_config
            layer.module.eabf_scale = LayerScale(
                rule=resolution.scaling.entry.logit_scale,
                original_max_position_embeddings=report.original_max_position_embeddings,
                model_config=new_config,
                pass_scale=pass_scale,
            )
    setattr(model, _STATE, state)
    model.save_pretrained = MethodType(save_patched, model)
    return report


def remove_method(model: PreTrainedModel) -> RopeScalingConfig:
    """Take a method off again; the logits are bit for bit what they were before it.

    A model that was loaded from a scaled checkpoint gets its original base and window.

    Returns:
        the config that was removed.

    Raises:
        InvalidConfigError: the model carries no method applied by this package.
    """
    model = _unwrapped(model)
    state: PatchState | None = getattr(model, _STATE, None)
    if state is None:
        raise InvalidConfigError(
            "the model carries no method to remove: only what apply_method or load_model put on can be taken off"
        )
    new_config = architectures.decoder(model).config
    # A kernel chosen while patched stays chosen.
    state.original_config._attn_implementation = new_config._attn_implementation
    for layer in architectures.attention_layers(model):
        if hasattr(layer.module, "eabf_scale"):
            del layer.module.eabf_scale
            layer.module.config = new_config
    _swap_config(model, new_config, state.original_config)
    architectures.decoder(model).rotary_emb = state.original_rotary.to(model.device)
    for hook in state.hooks:
        hook.remove()
    delattr(model, _STATE)
    del model.save_pretrained
    return state.resolution.scaling


def describe_patch(model: PreTrainedModel) -> RopeScalingConfig | None:
    """The method that a model carries, with all its numbers, or None."""
    state = getattr(_unwrapped(model), _STATE, None)
    return state.resolution.scaling if state is not None else None


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT or torch.compile wrapper."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"expected a transformers model, got {type(model).__name__}")
    return model


def _swap_config(model: PreTrainedModel, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """Point every module that holds one configuration object at another.

    The object itself is left alone, because two models may have been built from it.
    """
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
