"""What tells one model family from another, as data for the reference decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

NormKind = Literal["rms", "rms_plus_one", "layer", "layer_no_bias", "layer_no_weight"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family's block layout; the names are those of its weights."""

    norm: NormKind = "rms"
    epsilon: str | float = "rms_norm_eps"
    """Name of the configuration field, or the value where the family has none."""
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    """The MLP reads the same normed input as the attention."""
    pairs: Literal["halves", "neighbours"] = "halves"
    """Dimension j turns with j + d/2, or with its neighbour."""
    output_projection: str = "o_proj"
    final_norm: str = "norm"
    mlp: str = "mlp"
    router: str = "gate"
    always_renormalised: bool = False
    """The chosen experts' weights sum to 1 whatever `norm_topk_prob` says."""
    embedding_is_scaled: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""


_POST_NORM = {
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_mlp": None,
    "after_mlp": "post_feedforward_layernorm",
}
_GEMMA = {"norm": "rms_plus_one", "embedding_is_scaled": True}
_GEMMA_SANDWICH = {
    **_GEMMA,
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_COHERE = {"norm": "layer_no_bias", "epsilon": "layer_norm_eps", "parallel": True, "pairs": "neighbours"}

FAMILIES: dict[str, Family] = {
    "arcee": Family(),
    "cohere": Family(**_COHERE),
    "cohere2": Family(**_COHERE),
    "ernie4_5": Family(pairs="neighbours"),
    "exaone4": Family(**_POST_NORM),
    "gemma": Family(**_GEMMA),
    "gemma2": Family(**_GEMMA_SANDWICH),
    "gemma3_text": Family(**_GEMMA_SANDWICH),
    "glm": Family(pairs="neighbours"),
    "glm4": Family(pairs="neighbours", after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "granite": Family(),
    "granitemoe": Family(mlp="block_sparse_moe", router="router", always_renormalised=True),
    "helium": Family(pairs="neighbours"),
    "llama": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": Family(always_renormalised=True),
    "olmo": Family(norm="layer_no_weight", epsilon=1e-5),
    "olmo2": Family(**_POST_NORM),
    "olmo3": Family(**_POST_NORM),
    "phi": Family(
        norm="layer",
        epsilon="layer_norm_eps",
        parallel=True,
        output_projection="dense",
        final_norm="final_layernorm",
    ),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "stablelm": Family(norm="layer", epsilon="layer_norm_eps"),
    "starcoder2": Family(norm="layer", epsilon="norm_epsilon"),
}


def is_sliding(config: Any, layer: int) -> bool:
    """Whether `layer` sees the last `sliding_window` keys only; without layer types all layers are alike."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def has_rope(config: Any, layer: int) -> bool:
    """Whether `layer` rotates at all; NoPE layers do not."""
    if config.model_type == "smollm3":
        return bool(config.no_rope_layers[layer])
    hybrid = config.model_type == "exaone4" and config.sliding_window is not None
    if config.model_type == "cohere2" or hybrid:
        return is_sliding(config, layer)
    return True


def attention_multiplier(config: Any, head_dim: int) -> float:
    """What q . k is multiplied by before the softmax."""
    if config.model_type in ("granite", "granitemoe"):
        return config.attention_multiplier
    if config.model_type in ("gemma2", "gemma3_text"):
        return config.query_pre_attn_scalar**-0.5
    return head_dim**-0.5
