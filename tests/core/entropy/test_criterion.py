"""Slopes, the paper's criterion and the suggestion, on entropies whose slope is known."""

from __future__ import annotations

import math
from statistics import linear_regression

import pytest
import torch

from eabf_cli.core.entropy.averages import Average
from eabf_cli.core.entropy.criterion import LayerSlope, is_rising, slope_range, slope_weights, suggest
from eabf_cli.core.entropy.positions import choose_positions
from tests.architectures import ROPE_THETA, WINDOW, build_tiny_config
from tests.tiny_llama import tiny_llama

LENGTH = 4 * WINDOW


def layer(index: int, slope: float | None, stderr: float | None = 0.02, kind: str = "full") -> LayerSlope:
    return LayerSlope(index=index, kind=kind, scaled=False, slope=slope, slope_stderr=stderr)


def test_the_slope_is_that_of_a_regression_over_the_last_three_doublings_of_the_window() -> None:
    positions = choose_positions("log:40", 4096)
    entropy = [math.sin(position) + 0.7 * math.log(position) for position in positions]
    weights = slope_weights(positions, 1024, 4096)
    assert weights is not None
    inside = [index for index, position in enumerate(positions) if 128 <= position <= 1024]
    expected = linear_regression([math.log(positions[i]) for i in inside], [entropy[i] for i in inside]).slope
    assert float(torch.tensor(entropy, dtype=torch.float64) @ weights) == pytest.approx(expected, rel=1e-9)


def test_documents_that_end_inside_the_window_give_slopes_up_to_their_end() -> None:
    assert slope_range(1024, 4096) == (128, 1024)
    assert slope_range(8192, 1000) == (125, 1000)
    uniform = torch.tensor(choose_positions("log", 1000)).double().log()
    weights = slope_weights(choose_positions("log", 1000), 8192, 1000)
    assert weights is not None
    assert float(uniform @ weights) == pytest.approx(1.0)


def test_fewer_than_two_positions_tell_no_slope() -> None:
    assert slope_weights((1, 2, 500, 2000), 512, 2048) is None
    suggestion = suggest([layer(0, None, None)], build_tiny_config("llama"), factor=4.0, window=WINDOW, length=LENGTH)
    assert suggestion["unscaled_layers"] is None
    assert "fewer than two" in suggestion["reason"]


@pytest.mark.parametrize(
    ("slope", "stderr", "rises"),
    [(0.99, 0.04, True), (0.6, 0.04, True), (0.6, 0.06, False), (0.51, None, True), (0.5, None, False), (-1, 0, False)],
)
def test_rising_is_more_than_half_of_uniform_attention_by_two_standard_errors(
    slope: float, stderr: float | None, rises: bool
) -> None:
    assert is_rising(slope, stderr) is rises


def test_the_suggestion_exempts_what_rises_and_says_why() -> None:
    layers = [layer(0, 0.98), layer(1, 0.71), layer(2, 0.1), layer(3, -0.05), layer(4, 0.9, kind="sliding")]
    suggestion = suggest(layers, build_tiny_config("llama"), factor=8.0, window=WINDOW, length=LENGTH)
    assert suggestion["unscaled_layers"] == [0, 1]
    # The critical-dimension rule, from its formula (METHOD.md section 3), and the paper's value, whichever is larger.
    auto = (8 * WINDOW / math.tau) ** (math.log(ROPE_THETA) / math.log(WINDOW / math.tau))
    assert suggestion["rope_theta"] == pytest.approx(max(auto, 500_000.0), rel=1e-3)
    said = ["layers 0, 1", "0.71 to 0.98", "from 4 to 32 tokens", "other 2", "-0.05 to 0.10", "factor 8"]
    assert [part for part in said if part not in suggestion["reason"]] == []


def test_without_a_layer_that_stands_out_there_is_none_to_exempt() -> None:
    config = build_tiny_config("llama")
    held = suggest([layer(0, 0.2), layer(1, 0.1)], config, factor=4.0, window=WINDOW, length=LENGTH)
    assert held["unscaled_layers"] == []
    assert "no entropy rises" in held["reason"]
    rising = suggest([layer(0, 0.9), layer(1, 0.8)], config, factor=4.0, window=WINDOW, length=LENGTH)
    assert rising["unscaled_layers"] is None
    assert "all 2 layers" in rising["reason"]


def test_a_suggestion_from_one_document_says_so() -> None:
    config = build_tiny_config("llama")
    reasons = [
        suggest([layer(0, 0.9, stderr), layer(1, 0.1, stderr)], config, factor=4.0, window=WINDOW, length=LENGTH)[
            "reason"
        ]
        for stderr in (None, 0.02)
    ]
    assert ["one document" in reason for reason in reasons] == [True, False]
    assert ["standard errors" in reason for reason in reasons] == [False, True]


def test_models_with_nothing_to_scale_get_no_layers() -> None:
    layers = [layer(0, 0.9, kind="sliding"), layer(1, 0.9, kind="no_rope")]
    suggestion = suggest(layers, build_tiny_config("cohere2"), factor=4.0, window=WINDOW, length=LENGTH)
    assert suggestion["unscaled_layers"] is None
    assert not any(entry.rises for entry in layers)


def test_a_scaling_in_the_configuration_is_taken_off_for_the_suggestion() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 20_000.0, "original_max_position_embeddings": 64}
    config = tiny_llama(max_position_embeddings=256, rope_parameters=yarn).config
    suggestion = suggest([layer(0, 0.9), layer(1, 0.1)], config, factor=4.0, window=64, length=256)
    auto = (256 / math.tau) ** (math.log(20_000.0) / math.log(64 / math.tau))
    assert suggestion["rope_theta"] == pytest.approx(max(auto, 500_000.0), rel=1e-3)


def test_average_and_standard_error_are_those_of_the_sample() -> None:
    values = 100 + torch.randn(7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = Average()
    for number, value in enumerate(values, start=1):
        average.add(value)
        torch.testing.assert_close(average.mean, values[:number].mean(0))
        if number == 1:
            assert average.stderr is None
        else:
            torch.testing.assert_close(average.stderr, values[:number].std(0) / number**0.5)
