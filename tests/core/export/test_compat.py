"""The compatible forms keep base and window, and their price is what an evaluation of each side gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from eabf_cli.core.checkpoint import load_tokenizer
from eabf_cli.core.errors import InvalidConfigError, UnsupportedModelError
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.export.compat import compat_scaling, measure_compat
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import find_model
from tests.tiny_llama import write_tiny_llama

SCALING = RopeScalingConfig(
    method="eabf",
    factor=4.0,
    original_max_position_embeddings=256,
    rope_theta=70_000.0,
    original_rope_theta=10_000.0,
    unscaled_layers=(0, 1),
)


@pytest.mark.parametrize("method", ["abf", "native"])
def test_base_factor_and_window_stay(method: str) -> None:
    found = compat_scaling(SCALING, method, "llama")
    assert found == RopeScalingConfig(
        method=method, factor=4.0, original_max_position_embeddings=256, rope_theta=70_000.0
    )


@pytest.mark.parametrize("carried", ["abf", "yarn", "linear"])
def test_a_source_without_a_scale_has_nothing_to_leave_out(carried: str) -> None:
    scaling = RopeScalingConfig(method=carried, factor=4.0, original_max_position_embeddings=256)
    with pytest.raises(InvalidConfigError, match=f"'{carried}', which stock software runs as it is"):
        compat_scaling(scaling, "abf", "llama")


def test_a_native_source_is_native_already_and_may_leave_its_scale_out() -> None:
    scaling = RopeScalingConfig(
        method="native", factor=4.0, original_max_position_embeddings=256, rope_theta=5e5, unscaled_layers=()
    )
    with pytest.raises(InvalidConfigError, match="leave out --compat native"):
        compat_scaling(scaling, "native", "llama")
    assert compat_scaling(scaling, "abf", "llama").method == "abf"


def test_only_a_llama_has_a_stock_form_with_a_scale() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'qwen3'.*--compat abf"):
        compat_scaling(SCALING, "native", "qwen3")
    assert compat_scaling(SCALING, "abf", "qwen3").method == "abf"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose window holds the shortest prompts."""
    return write_tiny_llama(tmp_path_factory.mktemp("compat") / "plain", max_position_embeddings=256)


@pytest.fixture(scope="module")
def measured(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    source = tmp_path_factory.mktemp("source") / "eabf"
    request = MethodRequest(method="eabf", rope_theta=70_000.0)
    patch_checkpoint(PatchConfig(model=str(plain), output=source, request=request))
    scaling = compat_scaling(SCALING, "abf", "llama")
    return measure_compat(find_model(source), scaling, device="cpu", seed=3)


def test_each_side_is_what_evaluating_that_model_gives(plain: Path, measured: dict[str, Any]) -> None:
    config = EvalConfig.quick(tasks=("perplexity", "passkey", "needles"), lengths=(128, 256, 512, 1024), seed=3)
    for side, method in (("as_trained", "eabf"), ("compat", "abf")):
        model = AutoModelForCausalLM.from_pretrained(plain)
        apply_method(model, RopeScalingConfig(method=method, factor=4.0, rope_theta=70_000.0))
        expected = evaluate(model, load_tokenizer(plain), config)
        assert {**measured[side], "wall_s": 0} == {**expected, "wall_s": 0}
        assert measured[side]["method"] == method


def test_the_differences_are_those_of_the_two_sides(measured: dict[str, Any]) -> None:
    assert [row["length"] for row in measured["differences"]] == [128, 256, 512, 1024]
    for row, trained, compat in zip(
        measured["differences"], measured["as_trained"]["perplexity"], measured["compat"]["perplexity"], strict=True
    ):
        assert row["perplexity_difference"] == compat["perplexity"] - trained["perplexity"]
        assert row["perplexity_stderr"] == pytest.approx((compat["stderr"] ** 2 + trained["stderr"] ** 2) ** 0.5)
    inside = [row["perplexity_difference"] for row in measured["differences"][:2]]
    assert inside == pytest.approx([0, 0], abs=1e-2)
    assert abs(measured["differences"][-1]["perplexity_difference"]) > 1e-2


def test_the_summary_has_both_sides_inside_and_at_the_end(measured: dict[str, Any]) -> None:
    last = measured["differences"][-1]
    before, after = last["perplexity"]
    assert f"at 1,024 tokens perplexity {before:.4g} and {after:.4g}" in measured["summary"]
    assert "at 256 tokens" in measured["summary"]
    assert f"of {last['num_trials']}" in measured["summary"]
