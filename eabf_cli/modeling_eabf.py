"""RoPE language models whose attention logits are scaled by position: EABF (arXiv 2401.07004) and relatives.

This one file is everything that a checkpoint needs: it is copied beside the weights, and transformers (4.57
and 5.x) loads it with `trust_remote_code=True`. Importing it registers nothing and changes no class.

On disk a model has a model type of its own (`eabf_llama`, ...) and says what it does in `rope_scaling`:

    {"rope_type": "eabf", "type": "eabf", "factor": 4.0, "original_max_position_embeddings": 4096,
     "unscaled_layers": [0, 1], "original_rope_theta": 10000.0, "format": 1}

with the base frequency in `rope_theta`. In memory that dictionary is `config.eabf_scaling`, and transformers'
own rope fields describe a plain RoPE with the new base: the rotary module, and whatever reads those fields,
needs no knowledge of the scale.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.granite import modeling_granite as granite
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.smollm3 import modeling_smollm3 as smollm3
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config

ROPE_TYPES = ("eabf", "logn", "native")
FORMAT = 1

# The paper's released checkpoints say only {"type": "eabf", "factor": 4.0}; their code has these typed in.
LEGACY_ROPE_THETA = 500_000.0
LEGACY_ORIGINAL_ROPE_THETA = 10_000.0


def logit_scale(rope_type: str, position_ids: torch.Tensor, original_max_position_embeddings: int) -> torch.Tensor:
    """The factor t by which the attention logits of the query at each position are multiplied.

    With c the pre-trained window, p the position (from 0) and i = p + 1 the paper's position (from 1):
    `eabf` and `logn` give 1 up to i = c and ln i / ln c beyond it (arXiv 2401.07004, section 3; the Qwen-7B
    memo), `native` gives 1 + ln(1 + floor(p / c)) / ln c, the stepped form that transformers has built in.

    Args:
        rope_type: `eabf`, `logn` or `native`.
        position_ids: integers from 0, any shape.
        original_max_position_embeddings: c, in tokens.

    Returns:
        float32 of the shape of `position_ids`. Cast it last: computed in bfloat16 it is off by up to 0.45 %.

    Raises:
        ValueError: `rope_type` is none of the three, or c is below 2.
    """
    window = original_max_position_embeddings
    if window < 2:
        raise ValueError(f"original_max_position_embeddings must be at least 2, got {window}")
    if rope_type in ("eabf", "logn"):
        # ln i / ln c, written as 1 + ln(i / c) / ln c: exact at i = c, and never below 1 beyond it.
        beyond_window = 1.0 + ((position_ids + 1).float() / window).log() / math.log(window)
        return torch.where(position_ids < window, 1.0, beyond_window)
    if rope_type == "native":
        num_windows_before = torch.div(position_ids, window, rounding_mode="floor")
        return 1.0 + num_windows_before.float().log1p() / math.log(window)
    raise ValueError(f"rope_type {rope_type!r} has no logit scale; known: {', '.join(ROPE_TYPES)}")


# ---- Configuration -------------------------------------------------------------------------------


class _EABFConfig:
    """What each `EABF<Family>Config` adds to the configuration of its family.

    Reads `rope_theta` with `rope_scaling`, or the `rope_parameters` of transformers 5 that hold both; a file
    without the base frequency is refused, because its family's default would be silently wrong. Always writes
    `rope_theta`, `rope_scaling` and `auto_map`.

    Attributes:
        eabf_scaling: the `rope_scaling` dictionary as it is on disk.
        family_config: the family's own class.

    Raises:
        ValueError: a field is missing, malformed or contradicts another.
    """

    # transformers must not build one without arguments to learn its defaults: there are none for the scale.
    has_no_defaults_at_init = True
    _auto_class = "AutoConfig"
    family_config: type[Any]

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # a legacy file says "llama"
        scaling, rope_theta = _pop_scaling(type(self).__name__, kwargs)
        super().__init__(rope_theta=rope_theta, **kwargs)  # type: ignore[call-arg]
        _check_unscaled_layers(scaling["unscaled_layers"], self.num_hidden_layers)  # type: ignore[attr-defined]
        self.eabf_scaling = scaling

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()  # type: ignore[misc]
        scaling = output.pop("eabf_scaling", None)
        if scaling is None:  # a representation asked for before __init__ is through
            return output
        rope_parameters = output.pop("rope_parameters", None)  # transformers 5; 4.57 has rope_theta itself
        if rope_parameters is not None:
            output["rope_theta"] = rope_parameters["rope_theta"]
        output["rope_scaling"] = scaling
        output["auto_map"] = _auto_map(type(self))
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` gets.

        transformers 4.57 leaves out what equals its global defaults, and a field left out is read back as the
        family's default: fields that differ from that (`tie_word_embeddings` of a tied Llama) are put back.
        """
        output = super().to_diff_dict()  # type: ignore[misc]
        defaults = self.family_config().to_dict()
        for name, value in self.to_dict().items():
            if name in defaults and value != defaults[name] and not name.startswith("_"):
                output.setdefault(name, value)
        return output


def _pop_scaling(owner: str, kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Takes every rope field out of `kwargs`; returns (validated scaling dictionary, rope_theta).

    For the released legacy form `max_position_embeddings` in `kwargs` becomes the extended window.
    """
    candidates = [kwargs.pop("rope_scaling", None), kwargs.pop("rope_parameters", None)]
    rope_theta = kwargs.pop("rope_theta", None)
    found = next((c for c in candidates if isinstance(c, Mapping) and _rope_type(c) in ROPE_TYPES), None)
    if found is None:
        raise ValueError(
            f"{owner} needs `rope_scaling` with a rope_type of {', '.join(ROPE_TYPES)}; "
            f"got rope_scaling={candidates[0]!r}, rope_parameters={candidates[1]!r}"
        )
    scaling = copy.deepcopy(dict(found))
    scaling["rope_type"] = scaling["type"] = _rope_type(found)
    nested_theta = scaling.pop("rope_theta", None)
    _check_number(owner, "factor", scaling.get("factor"), above=1)

    if _is_released_form(scaling):
        return _complete_released_form(owner, scaling, kwargs)

    if rope_theta is None:
        rope_theta = nested_theta
    elif nested_theta is not None and nested_theta != rope_theta:
        raise ValueError(f"{owner}: rope_theta is {rope_theta} at the top and {nested_theta} in the rope fields")
    if rope_theta is None:
        raise ValueError(
            f"{owner}: rope_theta is missing, and the family's default would give wrong outputs. "
            "Add the base frequency that the model was trained with (500000.0 unless chosen otherwise)."
        )
    _check_number(owner, "rope_theta", rope_theta, above=0)
    return _checked_scaling(owner, scaling), float(rope_theta)


def _rope_type(rope_fields: Mapping[str, Any]) -> Any:
    return rope_fields.get("rope_type", rope_fields.get("type"))


def _is_released_form(scaling: Mapping[str, Any]) -> bool:
    ours = ("original_max_position_embeddings", "unscaled_layers", "format")
    return scaling["rope_type"] == "eabf" and not any(key in scaling for key in ours)


def _complete_released_form(
    owner: str, scaling: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """Fills in what the released checkpoints leave to their code, which scaled every layer."""
    window = kwargs.get("max_position_embeddings")
    _check_window(owner, "max_position_embeddings", window)
    kwargs["max_position_embeddings"] = round(window * scaling["factor"])
    scaling |= {
        "original_max_position_embeddings": window,
        "unscaled_layers": [],
        "original_rope_theta": LEGACY_ORIGINAL_ROPE_THETA,
    }
    return _checked_scaling(owner, scaling), LEGACY_ROPE_THETA


def _checked_scaling(owner: str, scaling: dict[str, Any]) -> dict[str, Any]:
    """`scaling` with every value checked and normalised; the range of the layers is checked by the caller."""
    version = scaling.setdefault("format", FORMAT)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise ValueError(
            f"{owner}: rope_scaling has format {version!r}, this modeling_eabf.py reads up to {FORMAT}. "
            "Take the modeling_eabf.py that came with the checkpoint."
        )
    window = scaling.get("original_max_position_embeddings")
    _check_window(owner, "original_max_position_embeddings", window)
    layers = scaling.get("unscaled_layers")
    if not isinstance(layers, (list, tuple)) or any(isinstance(x, bool) or not isinstance(x, int) for x in layers):
        raise ValueError(f"{owner}: unscaled_layers must be a list of layer numbers, got {layers!r}")
    original_rope_theta = scaling.setdefault("original_rope_theta", None)
    if original_rope_theta is not None:
        _check_number(owner, "original_rope_theta", original_rope_theta, above=0)
    scaling["factor"] = float(scaling["factor"])
    scaling["unscaled_layers"] = sorted(set(layers))
    return scaling


def _check_number(owner: str, name: str, value: Any, above: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not above < value < math.inf:
        raise ValueError(f"{owner}: {name} must be a number greater than {above}, got {value!r}")


def _check_window(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f"{owner}: {name} must be a number of tokens, at least 2, got {value!r}")


def _check_unscaled_layers(unscaled_layers: list[int], num_hidden_layers: int) -> None:
    outside = [layer for layer in unscaled_layers if not 0 <= layer < num_hidden_layers]
    if outside:
        raise ValueError(f"unscaled_layers {outside} do not exist: the model has layers 0 to {num_hidden_layers - 1}")


# ---- Attention -----------------------------------------------------------------------------------


class _ScaledAttention:
    """The attention of a scaled layer: the family's own, with the query multiplied by `logit_scale`.

    A layer gets it by assignment to `__class__`, so the family's constructor and weights stay as they are.
    Servers rewrite the source of `forward` (vLLM's Transformers backend fuses the projections and puts in its
    own attention function), hence one plain expression per projection, no closure and no `super()`.
    """

    has_query_key_norm = False
    """Whether query and key go through `q_norm` and `k_norm`, per head, before the rotation."""
    window_in_config = False
    """Whether `config.sliding_window` rules every layer of the family, with no word of it in the module."""
    apply_rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """The family's own `apply_rotary_pos_emb`."""

    # Set when the layer is scaled.
    logit_scale_type: str
    original_max_position_embeddings: int

    # From the family's class.
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    training: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache_position: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled attention over `hidden_states` (batch, query, hidden); `position_ids` (batch or 1, query).

        Raises:
            ValueError: `position_ids` is absent; a guess would scale padded or packed rows wrongly.
        """
        if position_ids is None:
            raise ValueError(
                f"the scaled attention of layer {self.layer_idx} got no position_ids: "
                "call the whole model, or pass position_ids on to the layer"
            )
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape)  # (batch, query, heads, head_dim)
        key = self.k_proj(hidden_states).view(head_shape)
        value = self.v_proj(hidden_states).view(head_shape)
        if self.has_query_key_norm:
            query = self.q_norm(query)
            key = self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

        cos, sin = position_embeddings
        query, key = self.apply_rotary(query, key, cos, sin)
        scale = logit_scale(self.logit_scale_type, position_ids, self.original_max_position_embeddings)
        query = query * scale[:, None, :, None].to(query.dtype)

        if past_key_values is not None:
            # transformers 4.57 places keys in a static cache by cache_position; 5.x ignores the argument.
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        attention_interface = llama.eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            position_ids=position_ids,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


def _scale_layers(model: Any, attention_class: type[_ScaledAttention]) -> None:
    """Makes the attention of every layer that is to be scaled an `attention_class`.

    Layers with a sliding window and layers without RoPE stay as they are: the first never see more keys than
    they were trained with, the second have no positions to extend.

    Raises:
        ValueError: no layer is left to scale.
    """
    scaling = model.config.eabf_scaling
    attentions = [layer.self_attn for layer in model.layers]
    scaled = [
        attention
        for index, attention in enumerate(attentions)
        if index not in scaling["unscaled_layers"]
        and getattr(attention, "use_rope", True)
        and not _has_sliding_window(attention, attention_class)
    ]
    if not scaled:
        raise ValueError(
            f"{type(model).__name__} has no layer to scale: each of its {len(attentions)} layers "
            f"has a sliding window (sliding_window={getattr(model.config, 'sliding_window', None)}), "
            f"has no RoPE, or is in unscaled_layers={scaling['unscaled_layers']}"
        )
    for attention in scaled:
        attention.__class__ = attention_class
        attention.logit_scale_type = scaling["rope_type"]
        attention.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _has_sliding_window(attention: Any, attention_class: type[_ScaledAttention]) -> bool:
    owner = attention.config if attention_class.window_in_config else attention
    return getattr(owner, "sliding_window", None) is not None


# ---- Models --------------------------------------------------------------------------------------


def positions_from_mask(attention_mask: torch.Tensor, num_queries: int, num_cached: Any) -> torch.Tensor:
    """Positions (batch, query), from 0, that do not count the pads of a mask (batch, cached + query).

    Args:
        attention_mask: 1 for a token and 0 for a pad, one column for each cached and each new token.
        num_queries: number of new tokens.
        num_cached: number of cached tokens; an int, or a tensor where the cache counts on the device.
    """
    positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    columns = torch.arange(num_queries, device=attention_mask.device) + num_cached
    return positions.index_select(1, columns)


class _EABFModel:
    """What each `EABF<Family>Model` adds: scaled layers, and positions that do not count pads."""

    attention_class: type[_ScaledAttention]
    _auto_class = "AutoModel"

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _scale_layers(self, self.attention_class)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's forward. Without `position_ids`, a mask (batch, keys) gives them.

        Raises:
            ValueError: the mask has fewer columns than there are cached and new tokens.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        is_2d_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        if position_ids is None and is_2d_mask and tokens is not None:
            num_cached = past_key_values.get_seq_length() if past_key_values is not None else 0
            num_queries = tokens.shape[1]
            if isinstance(num_cached, int) and attention_mask.shape[1] < num_cached + num_queries:
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {num_cached} cached and "
                    f"{num_queries} new tokens: give one column to each, or pass position_ids"
                )
            position_ids = positions_from_mask(attention_mask, num_queries, num_cached)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class _EABFForCausalLM:
    """What each `EABF<Family>ForCausalLM` changes: its base model is the scaled one."""

    base_class: type[Any]
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        # Past the family's constructor, which builds the unscaled base model.
        PreTrainedModel.__init__(self, config)
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]


# ---- Families ------------------------------------------------------------------------------------
# transformers 5 makes a dataclass of each configuration class and gives it a constructor unless the class
# itself has one: hence `__init__` in every body.


class EABFLlamaConfig(_EABFConfig, LlamaConfig):
    model_type = "eabf_llama"
    family_config = LlamaConfig
    __init__ = _EABFConfig.__init__


class EABFLlamaAttention(_ScaledAttention, llama.LlamaAttention):
    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class EABFLlamaModel(_EABFModel, llama.LlamaModel):
    config_class = EABFLlamaConfig
    attention_class = EABFLlamaAttention


class EABFLlamaForCausalLM(_EABFForCausalLM, llama.LlamaForCausalLM):
    config_class = EABFLlamaConfig
    base_class = EABFLlamaModel


class EABFMistralConfig(_EABFConfig, MistralConfig):
    model_type = "eabf_mistral"
    family_config = MistralConfig
    __init__ = _EABFConfig.__init__


class EABFMistralAttention(_ScaledAttention, mistral.MistralAttention):
    apply_rotary = staticmethod(mistral.apply_rotary_pos_emb)
    window_in_config = True


class EABFMistralModel(_EABFModel, mistral.MistralModel):
    config_class = EABFMistralConfig
    attention_class = EABFMistralAttention


class EABFMistralForCausalLM(_EABFForCausalLM, mistral.MistralForCausalLM):
    config_class = EABFMistralConfig
    base_class = EABFMistralModel


class EABFQwen2Config(_EABFConfig, Qwen2Config):
    model_type = "eabf_qwen2"
    family_config = Qwen2Config
    __init__ = _EABFConfig.__init__


class EABFQwen2Attention(_ScaledAttention, qwen2.Qwen2Attention):
    apply_rotary = staticmethod(qwen2.apply_rotary_pos_emb)


class EABFQwen2Model(_EABFModel, qwen2.Qwen2Model):
    config_class = EABFQwen2Config
    attention_class = EABFQwen2Attention


class EABFQwen2ForCausalLM(_EABFForCausalLM, qwen2.Qwen2ForCausalLM):
    config_class = EABFQwen2Config
    base_class = EABFQwen2Model


class EABFQwen3Config(_EABFConfig, Qwen3Config):
    model_type = "eabf_qwen3"
    family_config = Qwen3Config
    __init__ = _EABFConfig.__init__


class EABFQwen3Attention(_ScaledAttention, qwen3.Qwen3Attention):
    apply_rotary = staticmethod(qwen3.apply_rotary_pos_emb)
    has_query_key_norm = True


class EABFQwen3Model(_EABFModel, qwen3.Qwen3Model):
    config_class = EABFQwen3Config
    attention_class = EABFQwen3Attention


class EABFQwen3ForCausalLM(_EABFForCausalLM, qwen3.Qwen3ForCausalLM):
    config_class = EABFQwen3Config
    base_class = EABFQwen3Model


class EABFSmolLM3Config(_EABFConfig, SmolLM3Config):
    model_type = "eabf_smollm3"
    family_config = SmolLM3Config
    __init__ = _EABFConfig.__init__


class EABFSmolLM3Attention(_ScaledAttention, smollm3.SmolLM3Attention):
    apply_rotary = staticmethod(smollm3.apply_rotary_pos_emb)


class EABFSmolLM3Model(_EABFModel, smollm3.SmolLM3Model):
    config_class = EABFSmolLM3Config
    attention_class = EABFSmolLM3Attention


class EABFSmolLM3ForCausalLM(_EABFForCausalLM, smollm3.SmolLM3ForCausalLM):
    config_class = EABFSmolLM3Config
    base_class = EABFSmolLM3Model


class EABFGraniteConfig(_EABFConfig, GraniteConfig):
    model_type = "eabf_granite"
    family_config = GraniteConfig
    __init__ = _EABFConfig.__init__

    @property
    def logit_scale(self) -> float:
        """What a server that runs the base model alone multiplies the logits by: Granite divides them."""
        return 1.0 / self.logits_scaling


class EABFGraniteAttention(_ScaledAttention, granite.GraniteAttention):
    apply_rotary = staticmethod(granite.apply_rotary_pos_emb)


class EABFGraniteModel(_EABFModel, granite.GraniteModel):
    config_class = EABFGraniteConfig
    attention_class = EABFGraniteAttention


class EABFGraniteForCausalLM(_EABFForCausalLM, granite.GraniteForCausalLM):
    config_class = EABFGraniteConfig
    base_class = EABFGraniteModel


class Family(NamedTuple):
    """The classes of one family."""

    config: type[Any]
    model: type[Any]
    causal_lm: type[Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(EABFLlamaConfig, EABFLlamaModel, EABFLlamaForCausalLM),
    "mistral": Family(EABFMistralConfig, EABFMistralModel, EABFMistralForCausalLM),
    "qwen2": Family(EABFQwen2Config, EABFQwen2Model, EABFQwen2ForCausalLM),
    "qwen3": Family(EABFQwen3Config, EABFQwen3Model, EABFQwen3ForCausalLM),
    "smollm3": Family(EABFSmolLM3Config, EABFSmolLM3Model, EABFSmolLM3ForCausalLM),
    "granite": Family(EABFGraniteConfig, EABFGraniteModel, EABFGraniteForCausalLM),
}
"""Base model type (`llama`) -> the classes that carry the scale for it."""


def _auto_map(config_class: type[Any]) -> dict[str, str]:
    family = next(family for family in FAMILIES.values() if family.config.__name__ == config_class.__name__)
    classes = {
        "AutoConfig": family.config,
        "AutoModel": family.model,
        "AutoModelForCausalLM": family.causal_lm,
    }
    return {auto: f"modeling_eabf.{cls.__name__}" for auto, cls in classes.items()}


def exported_class_names(base_model_type: str) -> dict[str, Any]:
    """The `config.json` fields that name this file's classes for a family.

    Returns:
        `model_type`, `architectures` and `auto_map`.

    Raises:
        KeyError: the family has no class here; the message lists those that have.
    """
    if base_model_type not in FAMILIES:
        raise KeyError(f"no exported class for model_type {base_model_type!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[base_model_type]
    return {
        "model_type": family.config.model_type,
        "architectures": [family.causal_lm.__name__],
        "auto_map": _auto_map(family.config),
    }
