"""A scaling's open fields are filled in from the model, and an older scaling is refused or undone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from eabf_cli.core.errors import AlreadyScaledError, InvalidConfigError, UnsupportedModelError
from eabf_cli.core.methods import METHODS
from eabf_cli.core.resolution import existing_scaling, original_window, resolve_scaling, scaled_config, without_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.architectures import ARCHITECTURE_CONFIGS, WINDOW, build_tiny_config

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}
TELLS_WINDOW = {"linear": None, "dynamic": 8192, "yarn": 2048, "llama3": 2048}


def llama(**rope: Any) -> PretrainedConfig:
    parameters = {"rope_type": "default", "rope_theta": 10_000.0} | rope
    return LlamaConfig(max_position_embeddings=8192, num_hidden_layers=4, rope_parameters=parameters)


def resolve(config: PretrainedConfig, *, rebase: bool = False, **fields: Any) -> Any:
    return resolve_scaling(config, RopeScalingConfig(**fields), rebase=rebase)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_filled_in(method: str) -> None:
    resolution = resolve(llama(), method=method)
    scaling = resolution.scaling
    assert not isinstance(scaling.rope_theta, str)
    assert all(getattr(scaling, field.name) is not None for field in fields(scaling))
    assert scaling.original_max_position_embeddings == 8192
    assert scaling.original_rope_theta == 10_000.0
    assert scaling.max_position_embeddings == 32_768
    # d = 128: 10,000 x 4^(128 / 126).
    theta = {"ntk": 40_889.7, "abf": 5e5, "eabf": 5e5, "native": 5e5}.get(method, 1e4)
    assert scaling.rope_theta == pytest.approx(theta, rel=1e-4)
    assert scaling.unscaled_layers == ((0, 1) if method == "eabf" else ())
    assert resolution.notes == ()
    assert resolution.theta_reason


@pytest.mark.parametrize("name", ARCHITECTURE_CONFIGS)
def test_the_model_s_config_is_left_alone(name: str) -> None:
    config = build_tiny_config(name)
    before = config.to_dict()
    resolution = resolve(config)
    scaled_config(resolution.base_config, resolution.scaling)
    assert config.to_dict() == before
    assert resolution.base_config.max_position_embeddings == WINDOW


def test_a_window_that_is_told_wins_over_the_model_s() -> None:
    resolution = resolve(llama(), original_max_position_embeddings=4096)
    assert resolution.scaling.max_position_embeddings == 16_384
    assert resolution.base_config.max_position_embeddings == 4096


def test_the_default_base_follows_the_model() -> None:
    qwen = llama(rope_theta=1e6)
    qwen.max_position_embeddings = 40_960
    resolution = resolve(qwen)
    assert resolution.scaling.rope_theta == pytest.approx(8.9e6, rel=0.01)
    assert "critical-dimension" in resolution.theta_reason
    assert resolve(qwen, rope_theta="paper").scaling.rope_theta == 1e6


def test_a_base_below_the_model_s_own_is_taken_with_a_note() -> None:
    resolution = resolve(llama(rope_theta=1e6), rope_theta=500_000)
    assert resolution.scaling.rope_theta == 500_000
    assert "BELOW" in resolution.theta_reason
    assert [("500,000" in note, "1,000,000" in note) for note in resolution.notes] == [(True, True)]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.raises_theta])
def test_a_base_that_a_method_sets_itself_cannot_be_given(method: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"123,456 cannot be set.*abf or eabf"):
        resolve(llama(), method=method, rope_theta=123_456)
    own = resolve(llama(), method=method).scaling
    assert resolve(llama(), method=method, rope_theta=own.rope_theta).scaling == own


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.logit_scale is None])
def test_exempt_layers_have_no_meaning_without_a_scale(method: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{method}.*unscaled_layers"):
        resolve(llama(), method=method, unscaled_layers=(0,))
    assert resolve(llama(), method=method, unscaled_layers=()).scaling.unscaled_layers == ()


def test_exempt_layers_must_exist() -> None:
    with pytest.raises(InvalidConfigError, match=r"0,4 .*layers are 0 to 3"):
        resolve(llama(), unscaled_layers=(0, 4))
    one_layer = llama()
    one_layer.num_hidden_layers = 1
    assert resolve(one_layer).scaling.unscaled_layers == (0,)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_model_is_refused_with_its_scaling_and_both_windows(kind: str) -> None:
    config = llama(**SCALINGS[kind])
    assert existing_scaling(config) == kind
    assert original_window(config) == TELLS_WINDOW[kind]
    with pytest.raises(AlreadyScaledError) as error:
        resolve(config)
    window = TELLS_WINDOW[kind]
    words = [kind, "8,192", "--rebase", f"{window:,}" if window else "--original-length"]
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("kind", SCALINGS)
def test_rebase_starts_from_the_plain_model(kind: str) -> None:
    window = TELLS_WINDOW[kind] or 4096
    told = {} if TELLS_WINDOW[kind] else {"original_max_position_embeddings": 4096}
    resolution = resolve(llama(**SCALINGS[kind]), rebase=True, **told)
    assert resolution.scaling.original_max_position_embeddings == window
    assert resolution.scaling.max_position_embeddings == 4 * window
    assert resolution.base_config.max_position_embeddings == window
    assert resolution.base_config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert [(kind in note, "8,192" in note, f"{window:,}" in note) for note in resolution.notes] == [(True,) * 3]


def test_a_linear_model_must_be_told_its_original_window() -> None:
    with pytest.raises(InvalidConfigError, match="--original-length"):
        resolve(llama(**SCALINGS["linear"]), rebase=True)
    with pytest.raises(InvalidConfigError, match="--original-length"):
        without_scaling(llama(**SCALINGS["linear"]), None)


def test_rebase_on_a_plain_model_changes_nothing() -> None:
    rebased, plain = resolve(llama(), rebase=True), resolve(llama())
    assert rebased.scaling == plain.scaling
    assert rebased.base_config.to_dict() == plain.base_config.to_dict()
    assert rebased.notes == ()


def test_a_temperature_of_the_model_s_own_is_a_scaling() -> None:
    config = build_tiny_config("ministral3_native")
    assert existing_scaling(config) == "llama_4_scaling"
    with pytest.raises(AlreadyScaledError, match="llama_4_scaling"):
        resolve(config)
    assert resolve(config, rebase=True).base_config.rope_parameters["llama_4_scaling_beta"] == 0.0


def test_a_model_without_rope_and_an_unknown_one_are_refused_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported.*llama"):
        resolve(GPT2Config())
    assert existing_scaling(GPT2Config()) is None
    no_rope = llama()
    no_rope.rope_parameters = None
    with pytest.raises(UnsupportedModelError, match="no RoPE"):
        resolve(no_rope)
