"""`config.json` of a scaled checkpoint: DESIGN.md section 4, field by field, and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

from eabf_cli.core.architectures import config_class
from eabf_cli.core.checkpoint_format import check_can_save, join_config, needs_modeling_file, split_config
from eabf_cli.core.errors import CheckpointError, EabfError, UnsupportedModelError
from eabf_cli.core.methods import METHODS
from eabf_cli.core.resolution import existing_scaling, resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.modeling_eabf import FAMILIES
from tests.architectures import ARCHITECTURE_CONFIGS, build_tiny_config
from tests.scalings import SCALED_METHODS, scaling_for

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")


def read(raw: dict[str, Any]) -> PretrainedConfig:
    return config_class(raw["model_type"]).from_dict(dict(raw))


def join(raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    config = read(raw)
    return join_config(raw, config, resolve_scaling(config, RopeScalingConfig(**fields)).scaling)


def rope_of(joined: dict[str, Any]) -> dict[str, Any]:
    return {name: joined[name] for name in ROPE_FIELDS if name in joined}


def test_eabf_is_written_as_the_design_says() -> None:
    joined = join(LLAMA_2)
    kept = {name: value for name, value in LLAMA_2.items() if name not in ("model_type", "architectures")}
    assert joined == kept | {
        "model_type": "eabf_llama",
        "architectures": ["EABFLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_eabf.EABFLlamaConfig",
            "AutoModel": "modeling_eabf.EABFLlamaModel",
            "AutoModelForCausalLM": "modeling_eabf.EABFLlamaForCausalLM",
        },
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "eabf",
            "type": "eabf",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "unscaled_layers": [0, 1],
            "original_rope_theta": 10000.0,
            "format": 1,
        },
    }


@pytest.mark.parametrize(
    ("method", "theta", "window", "scaling"),
    [
        ("linear", 1e4, 16384, {"rope_type": "linear", "factor": 4.0}),
        ("dynamic", 1e4, 4096, {"rope_type": "dynamic", "factor": 4.0}),
        ("yarn", 1e4, 16384, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}),
        (
            "ntk-by-parts",
            1e4,
            16384,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.0},
        ),
        ("abf", 5e5, 16384, None),
        # 10,000 x 4^(128 / 126)
        ("ntk", 1e4 * 4 ** (128 / 126), 16384, None),
    ],
)
def test_what_transformers_knows_is_written_its_way(
    method: str, theta: float, window: int, scaling: dict[str, Any] | None
) -> None:
    joined = join(LLAMA_2, method=method)
    assert joined["model_type"] == "llama"
    assert joined["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in joined
    expected = {"rope_theta": pytest.approx(theta), "rope_scaling": scaling, "max_position_embeddings": window}
    assert rope_of(joined) == expected


def test_native_on_a_llama_is_a_ministral3() -> None:
    joined = join(LLAMA_2, method="native")
    assert (joined["model_type"], joined["architectures"]) == ("ministral3", ["Ministral3ForCausalLM"])
    assert joined["sliding_window"] is None
    assert joined["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "llama_4_scaling_beta": pytest.approx(1 / math.log(4096)),
        "original_max_position_embeddings": 4096,
    }
    # vLLM's own class reads this one.
    assert joined["llama_4_scaling"] == {
        "original_max_position_embeddings": 4096,
        "beta": pytest.approx(1 / math.log(4096)),
    }
    assert "llama_4_scaling" not in split_config(joined).plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURE_CONFIGS)
def test_what_is_joined_splits_into_the_same(name: str, method: str) -> None:
    config = build_tiny_config(name)
    raw = json.loads(config.to_json_string(use_diff=False))
    scaling = resolve_scaling(config, scaling_for(method)).scaling
    if method in SCALED_METHODS and name not in FAMILIES and (name, method) != ("ministral3", "native"):
        with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}'.*abf"):
            check_can_save(config, scaling)
        return
    if name == "phi3" and method in ("linear", "dynamic", "yarn", "ntk-by-parts"):
        # Its configuration knows only longrope, and takes a yarn for that.
        with pytest.raises(UnsupportedModelError, match=r"phi3.*abf"):
            check_can_save(config, scaling)
        return
    check_can_save(config, scaling)
    joined = json.loads(json.dumps(join_config(raw, config, scaling)))
    split = split_config(joined)
    assert split.scaling == scaling
    assert split.note is None
    plain = read(split.plain)
    assert existing_scaling(plain) is None
    assert plain.max_position_embeddings == config.max_position_embeddings
    assert plain.rope_parameters == config.rope_parameters
    assert plain.architectures == joined.get("architectures") or plain.model_type != joined["model_type"]
    # Written again, it is the same file.
    assert join_config(split.plain, plain, scaling).keys() - {"architectures"} == joined.keys() - {"architectures"}
    assert rope_of(join_config(split.plain, plain, scaling)) == rope_of(joined)


@pytest.mark.parametrize("method", METHODS)
def test_only_a_scale_by_position_needs_code(method: str) -> None:
    scaling = scaling_for(method)
    assert needs_modeling_file("mistral", scaling) == (method in ("eabf", "logn", "native"))
    assert needs_modeling_file("llama", scaling) == (method in ("eabf", "logn"))


def test_a_llama_with_biases_has_no_native_form() -> None:
    with pytest.raises(UnsupportedModelError, match=r"biases.*eabf"):
        join(LLAMA_2 | {"attention_bias": True}, method="native")


def test_a_stock_checkpoint_is_left_as_it_is() -> None:
    for raw in (LLAMA_2, LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        split = split_config(raw)
        assert (split.plain, split.scaling, split.note) == (raw, None, None)


RELEASED = {name: value for name, value in LLAMA_2.items() if name != "rope_scaling"}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "eabf", "factor": 4.0}},
        {"rope_scaling": {"type": "eabf", "factor": 4}},
        {"rope_scaling": {"rope_type": "eabf", "factor": 4.0}, "rope_theta": 10_000.0},
        {"rope_parameters": {"type": "eabf", "rope_type": "eabf", "factor": 4.0, "rope_theta": 10_000.0}},
        {"rope_parameters": {"type": "eabf", "rope_type": "eabf", "factor": 4.0, "rope_theta": 500_000.0}},
    ],
)
def test_the_released_form_is_completed_as_its_code_ran(fields: dict[str, Any]) -> None:
    split = split_config(RELEASED | fields)
    assert split.scaling == RopeScalingConfig(
        factor=4.0,
        original_max_position_embeddings=4096,
        rope_theta=500_000.0,
        original_rope_theta=10_000.0,
        unscaled_layers=(),
    )
    assert split.note is not None
    assert [part for part in ("released", "4,096", "--unscaled-layers 0,1") if part not in split.note] == []
    plain = read(split.plain)
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert plain.max_position_embeddings == 4096
    assert type(plain) is LlamaConfig


def own(**fields: Any) -> dict[str, Any]:
    return join(LLAMA_2) | fields


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        pytest.param(own(rope_scaling=None), ["eabf_llama", "no rope_scaling"], id="no scaling"),
        pytest.param(own(rope_theta=None), ["no rope_theta", "export"], id="no theta"),
        pytest.param(own(rope_scaling={**own()["rope_scaling"], "format": 2}), ["format", "upgrade"], id="newer"),
        pytest.param(own(rope_scaling={**own()["rope_scaling"], "factor": "x"}), ["factor"], id="factor"),
        pytest.param(own(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["'yarn'"], id="a stock method"),
        pytest.param(
            own(rope_scaling={**own()["rope_scaling"], "rope_theta": 1e4}), ["500000.0", "10000.0"], id="two thetas"
        ),
        pytest.param(own(rope_scaling="eabf"), ["rope_scaling", "'eabf'"], id="a word"),
        pytest.param(LLAMA_2 | {"rope_scaling": ["yarn"]}, ["rope_scaling", "yarn"], id="a list"),
        pytest.param(own(model_type="eabf_nonsense"), ["nonsense"], id="family"),
        pytest.param(own(model_type=3), ["model_type", "3"], id="type"),
        pytest.param(join(LLAMA_2, method="yarn") | {"eabf_scaling": "yarn"}, ["eabf_scaling"], id="record"),
        pytest.param(
            {name: value for name, value in own(rope_scaling={"type": "eabf", "factor": 4}).items()
             if name != "max_position_embeddings"},
            ["max_position_embeddings"],
            id="released without window",
        ),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused_with_what_is_wrong(raw: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(EabfError) as error:
        split_config(raw)
    assert [word for word in said if word not in str(error.value)] == []
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_error_is_what_a_damaged_config_is() -> None:
    with pytest.raises(CheckpointError):
        split_config(own(rope_theta=None))
