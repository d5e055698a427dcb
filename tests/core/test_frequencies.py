"""Base frequencies against published values and against what they are meant to do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.frequencies import PAPER_THETA, choose_theta, critical_theta, ntk_theta

bases = st.floats(1e3, 1e7)
windows = st.integers(64, 2**18)
factors = st.floats(1.01, 64)


@pytest.mark.parametrize(
    ("theta", "window", "length", "expected"),
    [
        pytest.param(1e4, 4096, 16_384, 72_000, id="Llama-2 at 16,384"),
        pytest.param(1e6, 40_960, 163_840, 8.9e6, id="window 40,960 by 4"),
        pytest.param(1e4, 512, 2048, 182_000, id="demo model"),
        pytest.param(1e4, 512, 4096, 776_000, id="demo model at 4,096"),
    ],
)
def test_the_critical_dimension_rule_gives_the_values_of_the_design(
    theta: float, window: int, length: int, expected: float
) -> None:
    assert critical_theta(theta, window, length) == pytest.approx(expected, rel=0.01)


@given(theta=bases, window=windows, factor=factors)
def test_the_dimension_that_turned_once_in_the_window_turns_once_in_the_longer_one(
    theta: float, window: int, factor: float
) -> None:
    # The share s of the rotary dimension with period 2 pi theta^s = c has period L under the new base.
    share = math.log(window / (2 * math.pi)) / math.log(theta)
    length = round(factor * window)
    assert 2 * math.pi * critical_theta(theta, window, length) ** share == pytest.approx(length, rel=1e-9)


def test_a_window_in_which_nothing_turns_has_no_critical_dimension() -> None:
    with pytest.raises(InvalidConfigError, match="2 pi"):
        critical_theta(1e4, 6, 24)
    assert choose_theta(None, 1e4, 6, 24)[0] == PAPER_THETA


@given(theta=bases, factor=factors, pairs=st.integers(2, 128))
def test_ntk_divides_the_lowest_frequency_by_the_factor_and_keeps_the_highest(
    theta: float, factor: float, pairs: int
) -> None:
    rotary_dim = 2 * pairs
    new = ntk_theta(factor, theta, rotary_dim)
    lowest = -(rotary_dim - 2) / rotary_dim
    assert new**lowest == pytest.approx(theta**lowest / factor, rel=1e-9)


@given(theta=bases, window=windows, factor=factors, rule=st.sampled_from(["paper", "auto", None]))
def test_a_rule_never_lowers_the_base_and_the_default_is_the_larger(
    theta: float, window: int, factor: float, rule: str | None
) -> None:
    length = round(factor * window)
    chosen, reason = choose_theta(rule, theta, window, length)
    paper, _ = choose_theta("paper", theta, window, length)
    auto, _ = choose_theta("auto", theta, window, length)
    assert chosen >= theta
    assert paper == max(theta, 500_000)
    # Four digits of the rule.
    assert auto == pytest.approx(max(theta, critical_theta(theta, window, length)), rel=5e-4)
    assert choose_theta(None, theta, window, length)[0] == max(paper, auto)
    assert reason


@given(theta=bases, given_theta=st.floats(2, 1e9))
def test_a_number_is_taken_as_it_is_and_said_to_be_below(theta: float, given_theta: float) -> None:
    chosen, reason = choose_theta(given_theta, theta, 4096, 16_384)
    assert chosen == given_theta
    assert ("BELOW" in reason) == (given_theta < theta)


@pytest.mark.parametrize(
    ("window", "theta", "length", "expected", "words"),
    [
        (4096, 1e4, 16_384, 500_000, ["paper", "16,384"]),
        (40_960, 1e6, 163_840, 8.9e6, ["critical-dimension", "163,840", "500,000"]),
        (512, 1e4, 2048, 500_000, ["paper", "182"]),
    ],
)
def test_the_reason_of_the_default_names_every_candidate(
    window: int, theta: float, length: int, expected: float, words: list[str]
) -> None:
    chosen, reason = choose_theta(None, theta, window, length)
    assert chosen == pytest.approx(expected, rel=0.01)
    assert [word for word in words if word not in reason] == []
