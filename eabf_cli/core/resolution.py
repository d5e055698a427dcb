"""Filling in a `RopeScalingConfig` from the model's own configuration, and undoing an older scaling."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.errors import AlreadyScaledError, InvalidConfigError
from eabf_cli.core.frequencies import choose_theta
from eabf_cli.core.scaling_config import RopeScalingConfig


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A method's numbers for one model.

    Attributes:
        scaling: the config with every field filled in.
        base_config: the model's configuration without any scaling.
        theta_reason: where `rope_theta` comes from, in words.
        notes: what the user should know (an old scaling removed, a base below the model's own).
    """

    scaling: RopeScalingConfig
    base_config: PretrainedConfig
    theta_reason: str
    notes: tuple[str, ...] = ()


def existing_scaling(config: PretrainedConfig) -> str | None:
    """The name of the scaling that a configuration carries, or None for a plain RoPE model."""
    if not getattr(config, "rope_parameters", None):
        return None
    parameters = architectures.rope_parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        return str(kind)
    return "llama_4_scaling" if parameters.get("llama_4_scaling_beta") else None


def refuse_scaled(config: PretrainedConfig) -> None:
    """Refuse a configuration that carries a scaling.

    Raises:
        AlreadyScaledError: it does.
    """
    existing = existing_scaling(config)
    if existing is not None:
        raise AlreadyScaledError(
            f"the model is scaled already (rope_type {existing!r}, window {config.max_position_embeddings:,}); "
            "--rebase takes that off and starts from its original window "
            f"({_window_text(original_window(config))})"
        )


def original_window(config: PretrainedConfig) -> int | None:
    """The window a model was pre-trained with, from its own fields; None where they do not tell."""
    if existing_scaling(config) is None or existing_scaling(config) == "dynamic":
        return config.max_position_embeddings
    parameters = architectures.rope_parameters(config)
    return parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )


def without_scaling(config: PretrainedConfig, original_max_position_embeddings: int | None) -> PretrainedConfig:
    """A copy of the configuration with plain RoPE over the original window.

    Raises:
        InvalidConfigError: the original window is neither given nor told by the configuration.
    """
    window = original_max_position_embeddings or original_window(config)
    if window is None:
        raise InvalidConfigError(
            f"the model is scaled by {existing_scaling(config)!r} but does not tell its original window: "
            "give it with --original-length (original_max_position_embeddings)"
        )
    plain = copy.deepcopy(config)
    theta = architectures.rope_parameters(config)["rope_theta"]
    plain.max_position_embeddings = window
    architectures.set_rope_parameters(plain, {"rope_type": "default", "rope_theta": theta})
    return plain


def resolve_scaling(config: PretrainedConfig, scaling: RopeScalingConfig, *, rebase: bool = False) -> Resolution:
    """Fill in a scaling's open fields from a model's configuration.

    Args:
        config: the model's configuration; it is not changed.
        rebase: take an existing scaling off first instead of refusing it.

    Raises:
        UnsupportedModelError: an architecture outside the supported list, or one without RoPE.
        AlreadyScaledError: the model is scaled and `rebase` is not given.
        InvalidConfigError: numbers that make no sense for this model.
    """
    architectures.check_supported(config)
    notes = []
    existing = existing_scaling(config)
    if existing is not None:
        if not rebase:
            refuse_scaled(config)
        base = without_scaling(config, scaling.original_max_position_embeddings)
        notes.append(
            f"removed the model's {existing!r} scaling: window {config.max_position_embeddings:,} -> "
            f"{base.max_position_embeddings:,} before the new one"
        )
    else:
        base = copy.deepcopy(config)
        base.max_position_embeddings = scaling.original_max_position_embeddings or config.max_position_embeddings

    window = base.max_position_embeddings
    original_theta = float(architectures.rope_parameters(base)["rope_theta"])
    scaling = scaling.replace(original_max_position_embeddings=window, original_rope_theta=original_theta)
    entry = scaling.entry
    if entry.theta is None:
        theta, reason = choose_theta(scaling.rope_theta, original_theta, window, scaling.max_position_embeddings)
        if theta < original_theta:
            notes.append(
                f"rope_theta {theta:,.0f} is below the model's own {original_theta:,.0f}: "
                "that shortens the reach of its positions; rope_theta='auto' never does"
            )
    else:
        theta = entry.theta(scaling.factor, original_theta, architectures.rotary_dim(base))
        reason = f"set by the method {entry.name!r}"
        if scaling.rope_theta is not None and abs(scaling.rope_theta / theta - 1) > 1e-6:  # type: ignore[operator]
            raise InvalidConfigError(
                f"method {entry.name!r} uses rope_theta {theta:,.0f} for this model, so {scaling.rope_theta:,.0f} "
                "cannot be set: leave rope_theta out, or use abf or eabf, whose base is free"
            )
    unscaled = scaling.unscaled_layers
    if unscaled is None:
        unscaled = tuple(layer for layer in entry.unscaled_layers if layer < base.num_hidden_layers)
    if unscaled and entry.logit_scale is None:
        raise InvalidConfigError(f"method {entry.name!r} scales no logits, so unscaled_layers has no meaning there")
    if any(layer >= base.num_hidden_layers for layer in unscaled):
        raise InvalidConfigError(
            f"unscaled_layers {','.join(map(str, unscaled))} names a layer that the model does not have: "
            f"its layers are 0 to {base.num_hidden_layers - 1}"
        )
    return Resolution(
        scaling=scaling.replace(rope_theta=theta, unscaled_layers=unscaled),
        base_config=base,
        theta_reason=reason,
        notes=tuple(notes),
    )


def scaled_config(base: PretrainedConfig, scaling: RopeScalingConfig) -> PretrainedConfig:
    """The in-memory configuration of a model under a resolved scaling (plain RoPE types only)."""
    config = copy.deepcopy(base)
    architectures.set_rope_parameters(config, scaling.entry.rope_parameters(scaling))
    # transformers' yarn and dynamic read these fields as they are: absent, or with a default of their own.
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = scaling.original_max_position_embeddings
    if not scaling.entry.keeps_window_on_disk:
        config.max_position_embeddings = scaling.max_position_embeddings
    return config


def _window_text(window: int | None) -> str:
    return f"{window:,} tokens" if window is not None else "which --original-length must tell"
