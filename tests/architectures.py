"""Tiny random models of every supported architecture, the objects that the property tests run over.

All share one pre-trained window (`WINDOW`), so a test can speak of positions below and above it without
knowing the family. Sizes differ between families where a mix-up of two dimensions would go unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

WINDOW = 32
ROPE_THETA = 10_000.0
SLIDING_WINDOW = 12
VOCABULARY = 96

FULL, SLIDING = "full_attention", "sliding_attention"
ALTERNATING = [FULL, SLIDING, FULL, SLIDING]
"""Layer 2 is the only one that EABF scales: layer 0 is exempt by default, 1 and 3 slide."""


def _config(model_type: str, *, partial_rotary_factor: float | None = None, **fields: Any) -> PretrainedConfig:
    """The family's configuration in tiny sizes; `fields` go over them."""
    rope_parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    if partial_rotary_factor is not None:
        rope_parameters["partial_rotary_factor"] = partial_rotary_factor
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[model_type](**(sizes | fields))


def _two_rotaries(full_theta: float = ROPE_THETA, sliding_theta: float = 1_000.0) -> dict[str, Any]:
    """RoPE fields of the families that keep one rotary per layer type."""
    return {
        FULL: {"rope_type": "default", "rope_theta": full_theta},
        SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
    }


def _ministral3(llama_4_scaling_beta: float) -> PretrainedConfig:
    """Ministral-3 has a temperature of its own, `1 + beta ln(1 + floor(p / window))`; beta 0 turns it off."""
    rope_parameters = {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "llama_4_scaling_beta": llama_4_scaling_beta,
        "original_max_position_embeddings": WINDOW,
    }
    return _config("ministral3", head_dim=16, rope_parameters=rope_parameters)


# A head width that is not hidden_size / num_attention_heads, for the families that allow it.
_FREE_HEAD_DIM = {"hidden_size": 48, "head_dim": 16}
_GEMMA = {**_FREE_HEAD_DIM, "tie_word_embeddings": True}
_GLM = {**_FREE_HEAD_DIM, "partial_rotary_factor": 0.5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
_GRANITE = {
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
_SLIDES = {"layer_types": ALTERNATING, "sliding_window": SLIDING_WINDOW}

ARCHITECTURE_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "arcee": lambda: _config("arcee", head_dim=16),
    "cohere": lambda: _config("cohere", use_qk_norm=True, logit_scale=0.5),
    "ernie4_5": lambda: _config("ernie4_5", **_FREE_HEAD_DIM, use_bias=True),
    "exaone4": lambda: _config("exaone4", sliding_window=None, layer_types=[FULL] * 4),
    "gemma": lambda: _config("gemma", **_GEMMA),
    "gemma2": lambda: _config(
        "gemma2",
        **_GEMMA,
        **_SLIDES,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": lambda: _config(
        "gemma3_text", **_GEMMA, **_SLIDES, query_pre_attn_scalar=20, rope_parameters=_two_rotaries()
    ),
    "glm": lambda: _config("glm", **_GLM),
    "glm4": lambda: _config("glm4", **_GLM),
    "granite": lambda: _config("granite", **_GRANITE),
    "granitemoe": lambda: _config("granitemoe", **_GRANITE, num_local_experts=4, num_experts_per_tok=2),
    "helium": lambda: _config("helium", head_dim=16),
    "llama": lambda: _config("llama"),
    "ministral3": lambda: _ministral3(llama_4_scaling_beta=0.0),
    "mistral": lambda: _config("mistral", **_FREE_HEAD_DIM, sliding_window=None),
    "mixtral": lambda: _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmo": lambda: _config("olmo", clip_qkv=3.0),
    "olmo2": lambda: _config("olmo2"),
    "olmo3": lambda: _config("olmo3", **_SLIDES, rope_parameters=_two_rotaries(sliding_theta=ROPE_THETA)),
    "phi": lambda: _config("phi", partial_rotary_factor=0.5, qk_layernorm=True),
    "phi3": lambda: _config("phi3", partial_rotary_factor=0.75, sliding_window=None),
    "qwen2": lambda: _config("qwen2"),
    "qwen2_moe": lambda: _config("qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=56, mlp_only_layers=[1]),
    "qwen3": lambda: _config("qwen3", **_FREE_HEAD_DIM),
    "qwen3_moe": lambda: _config("qwen3_moe", **_FREE_HEAD_DIM, **_EXPERTS),
    "seed_oss": lambda: _config("seed_oss", **_FREE_HEAD_DIM, attention_bias=True),
    "smollm3": lambda: _config("smollm3", no_rope_layers=[1, 1, 1, 0]),
    "stablelm": lambda: _config("stablelm", partial_rotary_factor=0.5, use_qkv_bias=True, qk_layernorm=True),
    "starcoder2": lambda: _config("starcoder2", sliding_window=None),
}
"""One configuration for each supported model type, each with at least one layer that the method scales."""

VARIANT_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama_biased": lambda: _config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2_sliding": lambda: _config("qwen2", **_SLIDES, use_sliding_window=True),
    "qwen3_sliding": lambda: _config("qwen3", **_SLIDES, use_sliding_window=True),
    "smollm3_sliding": lambda: _config(
        "smollm3",
        no_rope_layers=[1, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=SLIDING_WINDOW,
        layer_types=[FULL, SLIDING, FULL, FULL],
    ),
    "stablelm_parallel": lambda: _config("stablelm", partial_rotary_factor=0.25, use_parallel_residual=True),
}
"""Other forms of the same families: windows on some layers, biases, a parallel residual."""

UNSCALABLE_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "cohere2": lambda: _config("cohere2", **_SLIDES, tie_word_embeddings=True, logit_scale=0.5),
    "exaone4_hybrid": lambda: _config("exaone4", **_SLIDES, sliding_window_pattern=2),
    "mistral_sliding": lambda: _config("mistral", **_FREE_HEAD_DIM, sliding_window=SLIDING_WINDOW),
    "mixtral_sliding": lambda: _config(
        "mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=SLIDING_WINDOW
    ),
    "phi3_sliding": lambda: _config("phi3", sliding_window=SLIDING_WINDOW),
    "starcoder2_sliding": lambda: _config("starcoder2", sliding_window=SLIDING_WINDOW),
}
"""Models in which every layer that has RoPE slides, so a position-dependent scale has nothing to act on."""

ALREADY_SCALED_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "ministral3_native": lambda: _ministral3(llama_4_scaling_beta=0.1),
}
"""Models whose own configuration scales the attention logits by position."""

ALL_CONFIGS = ARCHITECTURE_CONFIGS | VARIANT_CONFIGS | UNSCALABLE_CONFIGS | ALREADY_SCALED_CONFIGS


_QUERY_KEY_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_SPREADING_MATRICES = ("q_proj", "k_proj", "qkv_proj", "gate.weight", "router.weight")


def build_tiny_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The tiny configuration called `name`, with `overrides` set as attributes."""
    config = ALL_CONFIGS[name]()
    for field, value in overrides.items():
        setattr(config, field, value)
    return config


def build_tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model in eval mode; `model_type` is a key of any table above.

    `attn_implementation` among the overrides picks the attention kernel; every other override is set on the
    configuration. The same seed gives the same weights in every dtype,
    but for rounding.
    """
    attn_implementation = overrides.pop("attn_implementation", None)
    config = build_tiny_config(model_type, **overrides)
    if attn_implementation is None and getattr(config, "attn_logit_softcapping", None):
        # sdpa has no soft cap, and transformers drops it there without a word.
        attn_implementation = "eager"
    # Given here, the dtype leaves the rotary frequencies in float32, as loading does; a later cast would not.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    randomize_weights(model, seed)
    return model.eval()


@torch.no_grad()
def randomize_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill in weights for which every part of the model matters and rounding is not amplified.

    Matrices keep the variance of their input and norm weights scatter around 1, but for the query's and
    key's, which raise it so that attention is far from uniform; biases are small but not zero.
    """
    generator = torch.Generator().manual_seed(seed)
    is_gemma = model.config.model_type.startswith("gemma")
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            mean = 1.7 if any(part in name for part in _QUERY_KEY_NORMS) else 1.0
            # Gemma's norms multiply by 1 + weight.
            weight.copy_(mean - is_gemma + 0.2 * noise)
        elif weight.ndim == 1:
            weight.copy_(0.1 * noise)
        elif "embed_tokens" in name:
            weight.copy_(noise * weight.shape[-1] ** -0.5 if model.config.tie_word_embeddings else noise)
        else:
            gain = 1.6 if any(part in name for part in _SPREADING_MATRICES) else 1.0
            weight.copy_(gain * noise * weight.shape[-1] ** -0.5)


def random_tokens(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids `(batch, length)` without the three special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
