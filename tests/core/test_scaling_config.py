"""`RopeScalingConfig` refuses nonsense and survives its trip through `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eabf_cli.core.errors import EabfError, InvalidConfigError
from eabf_cli.core.methods import METHODS
from eabf_cli.core.scaling_config import RopeScalingConfig, choose_factor

FREE_THETA = [name for name, method in METHODS.items() if method.raises_theta]

factors = st.floats(1.001, 1024)
windows = st.integers(1024, 2**20)
thetas = st.floats(1.5, 1e12)


@st.composite
def configs(draw: st.DrawFn) -> RopeScalingConfig:
    """Any valid config, with each field given or left open."""
    method = draw(st.sampled_from(list(METHODS)))
    rules = st.sampled_from(["paper", "auto"]) if method in FREE_THETA else st.nothing()
    return RopeScalingConfig(
        method=method,
        factor=draw(factors),
        original_max_position_embeddings=draw(st.none() | windows),
        rope_theta=draw(st.none() | thetas | rules),
        original_rope_theta=draw(st.none() | thetas),
        unscaled_layers=draw(st.none() | st.lists(st.integers(0, 100)).map(tuple)),
    )


@given(configs())
def test_a_config_survives_its_trip_through_json(config: RopeScalingConfig) -> None:
    assert RopeScalingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**7) | st.floats() | st.sampled_from(["eabf", "yarn", "auto", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["factor", "type"]), inner),
    max_leaves=4,
)
keys = st.sampled_from(
    ["type", "rope_type", "format", "unknown", *(field.name for field in dataclasses.fields(RopeScalingConfig))]
)


@given(st.dictionaries(keys, json_values) | json_values)
def test_whatever_a_file_holds_is_read_or_refused(scaling: Any) -> None:
    try:
        config = RopeScalingConfig.from_dict(scaling)
    except InvalidConfigError:
        return
    assert config.factor > 1
    assert config.method in METHODS


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("factor", "rope_theta", "unscaled_layers"), json_values)))
def test_whatever_is_passed_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        config = RopeScalingConfig(**fields)
    except InvalidConfigError:
        return
    assert math.isfinite(config.factor)


@pytest.mark.parametrize("factor", [0, 1, 1.0, -4, 1e9, "four", "4", math.nan, math.inf, True, None, [4]])
def test_a_factor_that_extends_nothing_is_refused_by_name_and_value(factor: Any) -> None:
    with pytest.raises(InvalidConfigError, match="factor") as error:
        RopeScalingConfig(factor=factor)
    shown = f"{factor:g}" if isinstance(factor, int | float) and not isinstance(factor, bool) else repr(factor)
    assert shown in str(error.value)
    assert "for example 4" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "yarm"}, ["yarm", *METHODS, "pi"]),
        ({"original_max_position_embeddings": 1}, ["original_max_position_embeddings", "got 1"]),
        ({"original_max_position_embeddings": 4096.5}, ["original_max_position_embeddings", "4096.5"]),
        ({"original_max_position_embeddings": True}, ["original_max_position_embeddings", "True"]),
        ({"rope_theta": 1.0}, ["rope_theta", "1.0"]),
        ({"rope_theta": -5e5}, ["rope_theta", "-500000.0"]),
        ({"rope_theta": math.inf}, ["rope_theta", "inf"]),
        ({"rope_theta": 10**400}, ["rope_theta", "1000"]),
        ({"factor": 10**400}, ["factor", "1000"]),
        ({"original_max_position_embeddings": 10**400}, ["original_max_position_embeddings", "1,099,511,627,776"]),
        ({"rope_theta": "papre"}, ["rope_theta", "papre", "paper", "auto"]),
        ({"rope_theta": "auto", "method": "yarn"}, ["yarn", "auto", "abf, eabf, native"]),
        ({"original_rope_theta": 0}, ["original_rope_theta", "0"]),
        ({"unscaled_layers": (-1,)}, ["unscaled_layers", "-1"]),
        ({"unscaled_layers": (0, 1.5)}, ["unscaled_layers", "1.5"]),
        ({"unscaled_layers": "01"}, ["unscaled_layers", "'0'"]),
        ({"unscaled_layers": 2}, ["unscaled_layers", "2"]),
    ],
)
def test_a_malformed_field_is_refused_by_name_and_value(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InvalidConfigError) as error:
        RopeScalingConfig(**fields)
    assert [word for word in said if word not in str(error.value)] == []


def test_the_error_is_both_an_eabf_error_and_a_value_error() -> None:
    assert issubclass(InvalidConfigError, EabfError)
    assert issubclass(InvalidConfigError, ValueError)


def test_the_config_cannot_be_changed_and_its_fields_have_names() -> None:
    config = RopeScalingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.factor = 8.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        RopeScalingConfig("eabf", 8.0)  # type: ignore[misc]


def test_defaults_are_the_paper_s() -> None:
    config = RopeScalingConfig()
    assert (config.method, config.factor) == ("eabf", 4.0)
    assert (config.rope_theta, config.unscaled_layers) == (None, None)
    assert METHODS["eabf"].unscaled_layers == (0, 1)
    assert [name for name, method in METHODS.items() if method.unscaled_layers] == ["eabf"]


def test_an_alias_is_the_method_itself() -> None:
    assert RopeScalingConfig(method="pi") == RopeScalingConfig(method="linear")
    assert RopeScalingConfig.from_dict({"type": "pi", "factor": 2}).to_dict()["rope_type"] == "linear"


def test_whole_and_broken_numbers_are_one() -> None:
    whole = RopeScalingConfig.from_dict({"type": "eabf", "factor": 4})
    assert whole == RopeScalingConfig.from_dict({"type": "eabf", "factor": 4.0})
    assert isinstance(whole.factor, float)
    assert RopeScalingConfig(rope_theta=500_000) == RopeScalingConfig(rope_theta=5e5)


def test_layers_are_sorted_and_counted_once() -> None:
    assert RopeScalingConfig(unscaled_layers=(3, 0, 3)).unscaled_layers == (0, 3)
    assert RopeScalingConfig(unscaled_layers=()).unscaled_layers == ()


def test_a_copy_is_checked_again() -> None:
    assert RopeScalingConfig().replace(factor=8).factor == 8.0
    with pytest.raises(InvalidConfigError, match="factor"):
        RopeScalingConfig().replace(factor=1)


def test_the_extended_window_is_factor_times_the_original() -> None:
    assert RopeScalingConfig(original_max_position_embeddings=4096).max_position_embeddings == 16_384
    assert RopeScalingConfig(factor=1.3, original_max_position_embeddings=1000).max_position_embeddings == 1300
    with pytest.raises(InvalidConfigError, match="original window"):
        _ = RopeScalingConfig().max_position_embeddings


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"type": "eabf", "factor": 4, "beta": 1, "alpha": 2}, ["unknown", "alpha, beta"]),
        ({"type": "eabf", "factor": 4, "format": 2}, ["format", "2", "upgrade"]),
        ({"type": "eabf"}, ["no factor"]),
        ({"factor": 4}, ["one type", "none", "eabf"]),
        ({"type": "eabf", "rope_type": "yarn", "factor": 4}, ["one type", "eabf", "yarn"]),
        ({"type": "llama3", "factor": 4}, ["llama3", *METHODS]),
        ({"type": ["eabf"], "factor": 4}, ["method", "['eabf']"]),
        ({"type": "eabf", "factor": 4, "unscaled_layers": 1}, ["unscaled_layers", "1"]),
        ("eabf", ["dictionary", "eabf"]),
    ],
)
def test_a_dictionary_of_another_form_is_refused(scaling: Any, said: list[str]) -> None:
    with pytest.raises(InvalidConfigError) as error:
        RopeScalingConfig.from_dict(scaling)
    assert [word for word in said if word not in str(error.value)] == []


def test_both_words_for_the_type_are_read() -> None:
    for keys_given in (("type",), ("rope_type",), ("type", "rope_type")):
        assert RopeScalingConfig.from_dict({**dict.fromkeys(keys_given, "yarn"), "factor": 2}).method == "yarn"


@pytest.mark.parametrize(
    ("factor", "max_length", "expected"),
    [(None, None, 4.0), (2.5, None, 2.5), (None, 16_384, 4.0), (4, 16_384, 4.0), (None, 5000, 5000 / 4096)],
)
def test_factor_and_length_give_each_other(factor: float | None, max_length: int | None, expected: float) -> None:
    assert choose_factor(factor, max_length, 4096) == expected


@given(window=windows, length=st.integers(1025, 2**22))
def test_a_length_is_reached_exactly(window: int, length: int) -> None:
    if not window < length <= 1024 * window:
        with pytest.raises(InvalidConfigError):
            choose_factor(None, length, window)
        return
    factor = choose_factor(None, length, window)
    config = RopeScalingConfig(factor=factor, original_max_position_embeddings=window)
    assert config.max_position_embeddings == length


def test_numbers_that_disagree_are_shown_together() -> None:
    with pytest.raises(InvalidConfigError) as error:
        choose_factor(4, 32_768, 4096)
    assert [part for part in ("factor 4", "4,096", "16,384", "32,768") if part not in str(error.value)] == []


def test_a_length_inside_the_window_extends_nothing() -> None:
    with pytest.raises(InvalidConfigError, match=r"4,096.*--max-length"):
        choose_factor(None, 4096, 4096)
