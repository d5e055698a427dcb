from __future__ import annotations

import random

import pytest

from eabf_cli.core.evals.axes import length_ticks, linear_ticks, log_ticks, padded


@pytest.mark.parametrize("is_log", [False, True])
def test_ticks_are_few_round_and_inside(is_log: bool) -> None:
    rng = random.Random(0)
    for _ in range(500):
        low = 10 ** rng.uniform(-3, 4) * (1 if is_log else rng.choice((-1, 1)))
        high = low * 10 ** rng.uniform(0.05, 5) if is_log else low + 10 ** rng.uniform(-2, 4)
        found = (log_ticks if is_log else linear_ticks)(low, high, 6)
        assert 1 <= len(found) <= 6, (low, high)
        assert found == sorted(found)
        assert all(low - 1e-6 * abs(low) <= value <= high + 1e-6 * abs(high) for value in found)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 100, [1, 2, 5, 10, 20, 50, 100]), (15, 130, [20, 50, 100]), (20, 200_000, [100, 1_000, 10_000, 100_000])],
)
def test_log_ticks_are_those_of_a_log_axis(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high, 7) == pytest.approx(expected)


def test_linear_ticks_count_in_ones_twos_or_fives() -> None:
    assert linear_ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(-0.13, 0.02, 6) == pytest.approx([-0.1, -0.05, 0])


def test_few_lengths_are_their_own_ticks_and_many_have_doublings() -> None:
    assert length_ticks([512, 2048, 512], 6) == [512, 2048]
    assert length_ticks(list(range(64, 2048, 128)), 6) == [64, 128, 256, 512, 1024]


def test_a_range_gets_room_even_where_it_is_a_point() -> None:
    for is_log in (False, True):
        for low, high in ((1.0, 10.0), (5.0, 5.0)):
            start, end = padded(low, high, is_log=is_log)
            assert start < low <= high < end
    assert padded(0.0, 0.0, is_log=False) == (-1.0, 1.0)
