"""`config.json` of a scaled checkpoint: written from, and split back into, a plain one and its scaling.

Three forms exist (DESIGN.md section 4):
- methods that transformers knows keep the family's own model type and need no code;
- methods with a position-dependent scale get a model type of ours (`eabf_<family>`), which no runtime
  can mistake for an unscaled model;
- `native` on a Llama (or Ministral-3) is written as `ministral3`, whose stock attention has that scale.
The stock forms carry an `eabf_scaling` entry, which other software ignores, so that the method is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.errors import CheckpointError, UnsupportedModelError
from eabf_cli.core.frequencies import PAPER_THETA
from eabf_cli.core.resolution import scaled_config
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.modeling_eabf import FAMILIES, ROPE_TYPES, exported_class_names

MODELING_FILE = "modeling_eabf.py"
RECORD = "eabf_scaling"
_PREFIX = "eabf_"
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# Where vLLM's own Ministral-3 looks for the temperature; it does not read rope_parameters for it.
_VLLM_TEMPERATURE = "llama_4_scaling"
# Fields by which transformers finds other code, kernels or weight files than the architecture's own.
CODE_FIELDS = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "transformers_weights",
    "distributed_config",
    "custom_generate",
    "custom_pipelines",
)
# What the released checkpoints leave out: their code had the base and c typed in and scaled every layer.
RELEASED_ORIGINAL_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """A checkpoint's configuration taken apart.

    Attributes:
        plain: the configuration of the model without a method of ours.
        scaling: that method with all its numbers; None for a checkpoint that is not ours.
        note: what the user should know about how it is read.
    """

    plain: dict[str, Any]
    scaling: RopeScalingConfig | None = None
    note: str | None = None


def needs_modeling_file(model_type: str, scaling: RopeScalingConfig) -> bool:
    """Whether a checkpoint of this form is loaded through the bundled modelling file."""
    return scaling.entry.logit_scale is not None and not _is_stock_native(model_type, scaling)


def _is_stock_native(model_type: str, scaling: RopeScalingConfig) -> bool:
    """Whether Ministral-3's stock attention, whose weights are a Llama's, computes this scale."""
    return scaling.method == "native" and model_type in ("llama", architectures.TEMPERED)


def check_can_save(base: PretrainedConfig, scaling: RopeScalingConfig) -> None:
    """Refuse to save what could not be loaded again as it is.

    Raises:
        UnsupportedModelError: the family has no class in the bundled modelling file, or its own
            configuration in transformers does not take the method.
    """
    joined = join_config(base.to_dict(), base, scaling)
    if needs_modeling_file(base.model_type, scaling):
        return
    expected = architectures.rope_parameters(scaled_config(base, scaling))
    try:
        read_back = architectures.rope_parameters(architectures.config_class(joined["model_type"]).from_dict(joined))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise _not_taken(base, scaling) from error
    if {name: read_back.get(name) for name in expected} != expected and not _is_stock_native(base.model_type, scaling):
        raise _not_taken(base, scaling)


def _not_taken(base: PretrainedConfig, scaling: RopeScalingConfig) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a {base.model_type!r} checkpoint with method {scaling.method!r} could not be loaded again: transformers' "
        f"own {base.model_type!r} configuration does not take it. What works instead: method 'abf'"
    )


def _check_has_form(base: PretrainedConfig, scaling: RopeScalingConfig) -> None:
    if _is_stock_native(base.model_type, scaling):
        if getattr(base, "attention_bias", False) or getattr(base, "mlp_bias", False):
            raise UnsupportedModelError(
                "a Llama with attention or MLP biases cannot be written in the native form; use method 'eabf'"
            )
    elif needs_modeling_file(base.model_type, scaling) and base.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"a {base.model_type!r} model with method {scaling.method!r} can be used and trained here but not saved: "
            f"only {', '.join(FAMILIES)} have a checkpoint form that carries the scale. What works instead: "
            "method 'abf' or 'yarn', or saving a LoRA adapter and applying the method after loading"
        )


def join_config(raw: dict[str, Any], base: PretrainedConfig, scaling: RopeScalingConfig) -> dict[str, Any]:
    """The `config.json` of a scaled checkpoint.

    Args:
        raw: the plain model's `config.json`; fields that no method touches are kept as they are.
        base: the same configuration as transformers reads it, without any scaling.
        scaling: the resolved method.

    Raises:
        UnsupportedModelError: see `check_can_save`.
    """
    _check_has_form(base, scaling)
    config = scaled_config(base, scaling)
    parameters = architectures.rope_parameters(config)
    dropped = (*_ROPE_FIELDS, *CODE_FIELDS, RECORD, _VLLM_TEMPERATURE)
    joined = {name: value for name, value in raw.items() if name not in dropped}
    joined["max_position_embeddings"] = config.max_position_embeddings
    for name in ("head_dim", "original_max_position_embeddings"):
        if hasattr(base, name) and getattr(config, name) != getattr(base, name):
            joined[name] = getattr(config, name)
    joined["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        joined["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    record = scaling.to_dict()
    if needs_modeling_file(base.model_type, scaling):
        joined |= exported_class_names(base.model_type)
        joined["rope_scaling"] = {name: value for name, value in record.items() if name != "rope_theta"}
        return joined
    joined[RECORD] = record | {"base_model_type": base.model_type}
    if _is_stock_native(base.model_type, scaling):
        window = scaling.original_max_position_embeddings
        assert window is not None
        joined |= {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], "sliding_window": None}
        beta = 1 / math.log(window)
        joined["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": scaling.rope_theta,
            "llama_4_scaling_beta": beta,
            "original_max_position_embeddings": window,
        }
        joined[_VLLM_TEMPERATURE] = {"original_max_position_embeddings": window, "beta": beta}
        # SGLang's own Ministral-3 takes c from here, and without it another model's.
        joined["original_max_position_embeddings"] = window
    elif base.model_type == architectures.TEMPERED:
        joined["rope_parameters"] = config.rope_parameters
    elif architectures.is_nested_rope(base):
        joined["rope_parameters"] = config.rope_parameters
        joined["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    else:
        joined["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    return joined


def split_config(raw: dict[str, Any]) -> SplitConfig:
    """Take a checkpoint's `config.json` apart into the plain model and the method on it.

    Fields that make transformers look for other code than the architecture's own are dropped (`CODE_FIELDS`).

    Raises:
        CheckpointError: a model type of ours without its theta or its scaling.
        InvalidConfigError: a scaling entry that makes no sense.
    """
    raw = {name: value for name, value in raw.items() if name not in CODE_FIELDS}
    model_type = raw.get("model_type", "")
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json has model_type {model_type!r}: it is not a transformers model")
    for name in (RECORD, "rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise CheckpointError(f"config.json has {name} {raw[name]!r}, a dictionary is expected: it was damaged")
    if raw.get(RECORD):
        record = dict(raw[RECORD])
        base_type = record.pop("base_model_type", model_type)
        if not isinstance(base_type, str):
            raise CheckpointError(f"config.json has base_model_type {base_type!r} in {RECORD}: it was damaged")
        scaling = RopeScalingConfig.from_dict(record)
        return SplitConfig(plain=_plain(raw, base_type, scaling), scaling=scaling)
    entry = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if model_type.startswith(_PREFIX) or (entry.get("rope_type") or entry.get("type")) == "eabf":
        return _split_scaled(raw, entry)
    return SplitConfig(plain=raw)


def _split_scaled(raw: dict[str, Any], entry: dict[str, Any]) -> SplitConfig:
    model_type = raw.get("model_type", "").removeprefix(_PREFIX)
    window = raw.get("max_position_embeddings")
    if not entry:
        raise CheckpointError(
            f"config.json has model_type {raw['model_type']!r} but no rope_scaling: it was damaged, export it again"
        )
    kind = entry.get("rope_type", entry.get("type"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json has model_type {raw['model_type']!r} but the rope_type {kind!r}, "
            "which is none of ours: it was damaged, export it again"
        )
    if not {"original_max_position_embeddings", "unscaled_layers", "format"} & set(entry):
        if window is None:
            raise CheckpointError("config.json has an eabf rope_scaling but no max_position_embeddings: it was damaged")
        own_theta = raw.get("rope_theta") or entry.get("rope_theta")
        scaling = RopeScalingConfig(
            factor=entry.get("factor", 4.0),
            original_max_position_embeddings=window,
            rope_theta=PAPER_THETA,
            original_rope_theta=own_theta if own_theta not in (None, PAPER_THETA) else RELEASED_ORIGINAL_THETA,
            unscaled_layers=(),
        )
        note = (
            "released EABF checkpoint: read as its own code ran it, every layer scaled, "
            f"rope_theta {PAPER_THETA:,.0f}, c = {window:,}; --unscaled-layers 0,1 gives the paper's variant"
        )
        return SplitConfig(plain=_plain(raw, model_type, scaling), scaling=scaling, note=note)
    thetas = [found for found in (raw.get("rope_theta"), entry.get("rope_theta")) if found is not None]
    if thetas and thetas[0] != thetas[-1]:
        raise CheckpointError(
            f"config.json has rope_theta {thetas[0]!r} at the top and {thetas[1]!r} in its rope fields: it was damaged"
        )
    if not thetas:
        raise CheckpointError(
            "config.json has an eabf rope_scaling but no rope_theta, so its frequencies are not known: "
            "it was written by other software; export the checkpoint again"
        )
    known = {name: value for name, value in entry.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaling = RopeScalingConfig.from_dict(known | {"rope_theta": thetas[0]})
    return SplitConfig(plain=_plain(raw, model_type, scaling), scaling=scaling)


def _plain(raw: dict[str, Any], model_type: str, scaling: RopeScalingConfig) -> dict[str, Any]:
    """The configuration of the model before the method was applied."""
    dropped = ("rope_scaling", RECORD, "rope_theta", _VLLM_TEMPERATURE)
    plain = {name: value for name, value in raw.items() if name not in dropped}
    parameters = plain.pop("rope_parameters", None) or {}
    if "full_attention" in parameters:
        full = {"rope_type": "default", "rope_theta": scaling.original_rope_theta}
        plain["rope_parameters"] = parameters | {"full_attention": full}
    elif model_type == architectures.TEMPERED:
        off = architectures.temperature_off(scaling.original_max_position_embeddings)
        plain["rope_parameters"] = {"rope_type": "default", "rope_theta": scaling.original_rope_theta, **off}
    elif "partial_rotary_factor" in parameters:
        plain.setdefault("partial_rotary_factor", parameters["partial_rotary_factor"])
    plain |= {
        "model_type": model_type,
        "rope_theta": scaling.original_rope_theta,
        "max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if model_type != raw.get("model_type"):
        plain.pop("original_max_position_embeddings", None)
        causal_class = AutoModelForCausalLM._model_mapping.get(architectures.config_class(model_type), None)
        if causal_class is None:
            raise UnsupportedModelError(f"config.json has a scaled {model_type!r}, which is no language model")
        plain["architectures"] = [causal_class.__name__]
    return plain
