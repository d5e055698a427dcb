"""Where a transformers model keeps what a method changes: the one place that knows its internals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eabf_cli.core.errors import CheckpointError, UnsupportedModelError, first_line

# Model types whose attention goes through transformers' attention interface with position ids, and for
# which the tests hold the patched model to an independent reference (tests/architectures.py).
SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "ministral3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "granitemoe",
    "glm",
    "glm4",
    "cohere",
    "cohere2",
    "exaone4",
    "starcoder2",
    "stablelm",
    "helium",
    "seed_oss",
    "arcee",
    "ernie4_5",
)

# The model type whose attention has a temperature by position in every forward.
TEMPERED = "ministral3"

# Families in which some layers skip RoPE, and how such a layer's attention shows it.
_USES_ROPE: dict[str, Callable[[nn.Module], bool]] = {
    "smollm3": lambda attention: bool(attention.use_rope),
    "cohere2": lambda attention: attention.sliding_window is not None,
    "exaone4": lambda attention: attention.sliding_window is None or bool(attention.is_sliding),
}


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One decoder layer's attention: its module, and what limits the window there."""

    index: int
    module: nn.Module
    uses_rope: bool
    is_sliding: bool

    @property
    def can_scale(self) -> bool:
        """A logit scale belongs where a RoPE layer attends to everything before it."""
        return self.uses_rope and not self.is_sliding


def check_supported(config: PretrainedConfig) -> None:
    """Refuse a configuration that the methods cannot be applied to.

    Raises:
        UnsupportedModelError: an unknown architecture (the message lists the known ones), or no RoPE.
    """
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        text = getattr(config, "text_config", None)
        inner = f" (its text part is {text.model_type!r}: load that alone)" if text is not None else ""
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not supported{inner}; "
            f"supported: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        )
    if not getattr(config, "rope_parameters", None):
        raise UnsupportedModelError(f"this {config.model_type!r} config has no rope_theta: there is no RoPE to extend")


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The module that holds the layers and the rotary embedding, below a language-model head or not."""
    return model.get_decoder()


def attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """Every layer's attention in order, with whether it rotates and whether it slides."""
    config = decoder(model).config
    uses_rope = _USES_ROPE.get(config.model_type, lambda _: True)
    layers = []
    for index, layer in enumerate(decoder(model).layers):
        attention = layer.self_attn
        layers.append(
            AttentionLayer(
                index=index,
                module=attention,
                uses_rope=uses_rope(attention),
                is_sliding=_slides(attention, config, index),
            )
        )
    return layers


def _slides(attention: nn.Module, config: PretrainedConfig, index: int) -> bool:
    if getattr(config, "layer_types", None):
        return config.layer_types[index] == "sliding_attention"
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window is not None
    return getattr(config, "sliding_window", None) is not None


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config without its weights (on the meta device), to look at its layers.

    Raises:
        CheckpointError: transformers cannot build a model from these values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    # Any value may be wrong, and transformers checks few of them.
    except Exception as error:
        raise CheckpointError(
            f"no {config.model_type!r} model can be built from its config.json: {first_line(error)}"
        ) from error


# --- RoPE parameters: flat for most families, one entry per layer type for a few ------------------------


def is_nested_rope(config: PretrainedConfig) -> bool:
    """Whether full-attention and sliding layers have rotary embeddings of their own (gemma3, olmo3)."""
    return "full_attention" in (getattr(config, "rope_parameters", None) or {})


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The RoPE parameters of the full-attention layers."""
    return dict(config.rope_parameters["full_attention"] if is_nested_rope(config) else config.rope_parameters)


def follows_length(config: PretrainedConfig) -> bool:
    """Whether the frequencies depend on the length of a call, so that a longer one changes earlier predictions."""
    return rope_parameters(config).get("rope_type") in ("dynamic", "longrope")


def set_rope_parameters(config: PretrainedConfig, parameters: dict[str, Any]) -> None:
    """Replace the RoPE parameters of the full-attention layers, keeping what no method changes."""
    kept = {"partial_rotary_factor": rope_parameters(config).get("partial_rotary_factor")}
    if config.model_type == TEMPERED:
        kept |= temperature_off(config.max_position_embeddings)
    parameters = {name: value for name, value in kept.items() if value is not None} | parameters
    if is_nested_rope(config):
        config.rope_parameters = {**config.rope_parameters, "full_attention": parameters}
    else:
        config.rope_parameters = parameters


def temperature_off(window: int | None) -> dict[str, Any]:
    """RoPE parameters with which Ministral-3's own 1 + beta ln(1 + floor(p / window)) is 1.

    They are always written: without any, its configuration turns to a yarn of its own.
    """
    return {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": window}


def rotary_dim(config: PretrainedConfig) -> int:
    """Dimensions of a head that are rotated (all, or `partial_rotary_factor` of them)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * (rope_parameters(config).get("partial_rotary_factor") or 1.0))


def build_rotary_embedding(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module:
    """A rotary embedding of the model's own class for another config, on the same device.

    Its frequencies stay float32 whatever the model's dtype: transformers keeps them so, too.
    """
    old = decoder(model).rotary_emb
    device = next(iter(old.buffers())).device
    return type(old)(config=config).to(device).train(old.training)


# --- The language-model head ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LogitsTransform:
    """What becomes of the logits after the head: `scale * x`, then under a cap `soft_cap * tanh(x / soft_cap)`."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits, of any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()


# Families that change their logits between the head and the loss.
_LOGITS_TRANSFORM: dict[str, Callable[[PretrainedConfig], LogitsTransform]] = {
    "granite": lambda config: LogitsTransform(scale=1 / config.logits_scaling),
    "granitemoe": lambda config: LogitsTransform(scale=1 / config.logits_scaling),
    "cohere": lambda config: LogitsTransform(scale=config.logit_scale),
    "cohere2": lambda config: LogitsTransform(scale=config.logit_scale),
    "gemma2": lambda config: LogitsTransform(soft_cap=config.final_logit_softcapping),
    "gemma3_text": lambda config: LogitsTransform(soft_cap=config.final_logit_softcapping),
}


def logits_transform(config: PretrainedConfig) -> LogitsTransform:
    """What the family does to its logits; for most of them nothing."""
    return _LOGITS_TRANSFORM.get(config.model_type, lambda _: LogitsTransform())(config)


def router_loss(model: PreTrainedModel, outputs: Any, attention_mask: Tensor | None) -> Tensor | None:
    """What a mixture of experts adds to its loss to balance them; None unless the decoder gave router logits.

    They are given if `output_router_logits` is set, which no family does by default.
    """
    router_logits = getattr(outputs, "router_logits", None)
    if router_logits is None:
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    balance = load_balancing_loss_func(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return model.router_aux_loss_coef * balance


# --- Attention kernels ---------------------------------------------------------------------------------


def attention_kernel(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The kernel that the stock forward of this attention would have called for this implementation."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def config_class(model_type: str) -> type[PretrainedConfig]:
    """transformers' own configuration class of a model type.

    Raises:
        UnsupportedModelError: transformers has no such model type.
    """
    try:
        return type(AutoConfig.for_model(model_type))
    except ValueError as error:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known to transformers; "
            f"supported: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}"
        ) from error
