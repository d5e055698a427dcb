"""Intervals against exact distributions and known coverage; Holm's correction against the closed test it stands for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, combinations, product
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.statistics import Estimate, bootstrap_mean, check_statistics, holm


def exact_share_below(values: list[float], limit: float) -> float:
    """P(resampled mean <= limit) for three units: all 27 draws, and chi2 with 2 degrees of freedom in closed form."""
    distance = limit - fmean(values)
    shares = []
    for draw in product(values, repeat=3):
        deviation = fmean(draw) - fmean(values)
        # The resampled mean is off by deviation * sqrt(3 / chi2), always on the deviation's own side.
        if deviation * distance < 1e-12:
            shares.append(float(distance > 0))
            continue
        share_beyond = 1 - math.exp(-1.5 * (deviation / distance) ** 2)
        shares.append(1 - share_beyond if distance > 0 else share_beyond)
    return fmean(shares)


def test_interval_and_p_value_are_those_of_the_exact_distribution() -> None:
    values = [0.2, 1.4, 0.9]
    estimate = bootstrap_mean([values], seed=0, num_resamples=400_000)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.mean == pytest.approx(fmean(values))
    assert exact_share_below(values, estimate.low) == pytest.approx(0.025, abs=0.001)
    assert exact_share_below(values, estimate.high) == pytest.approx(0.975, abs=0.001)
    below_zero = exact_share_below(values, 0.0)
    assert 0.02 < below_zero < 0.2
    assert estimate.p_value == pytest.approx(2 * below_zero, abs=0.003)
    assert estimate.positive_share == pytest.approx(1 - below_zero, abs=0.0015)


def test_many_normal_units_have_students_interval() -> None:
    values = np.random.default_rng(3).normal(1, 2, 30).tolist()
    estimate = bootstrap_mean([values], seed=1, num_resamples=100_000)
    half_width = 2.0452 * stdev(values) / math.sqrt(30)  # t of 29 degrees of freedom, from a printed table
    assert estimate.low == pytest.approx(fmean(values) - half_width, abs=0.06 * half_width)
    assert estimate.high == pytest.approx(fmean(values) + half_width, abs=0.06 * half_width)


def covered_share(num_seeds: int, num_units: int, seed_spread: float, unit_spread: float, noise: float) -> float:
    """How often the 95 % interval holds the true mean, in 600 crossed tables of normal effects."""
    rng = np.random.default_rng(7)
    covered = 0
    for number in range(600):
        table = (
            0.3
            + rng.normal(0, seed_spread, (num_seeds, 1))
            + rng.normal(0, unit_spread, (1, num_units))
            + rng.normal(0, noise, (num_seeds, num_units))
        )
        estimate = bootstrap_mean(table.tolist(), seed=number, num_resamples=1_000)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.3 <= estimate.high
    return covered / 600


# 600 tables have a standard error of 0.9 points; where both spread, the sum of the two is on the safe side.
@pytest.mark.parametrize(
    ("num_seeds", "num_units", "seed_spread", "unit_spread", "noise"),
    [(1, 16, 0.0, 1.0, 0.0), (3, 16, 1.0, 0.1, 0.1), (3, 16, 0.3, 1.0, 0.5), (5, 12, 0.0, 0.0, 1.0)],
)
def test_intervals_hold_the_true_mean_as_often_as_they_say(
    num_seeds: int, num_units: int, seed_spread: float, unit_spread: float, noise: float
) -> None:
    assert 0.925 <= covered_share(num_seeds, num_units, seed_spread, unit_spread, noise) <= 1.0


def test_seeds_that_disagree_widen_the_interval_and_units_alone_do_not_tell() -> None:
    units = np.random.default_rng(0).normal(0, 1, 20)
    together = bootstrap_mean([(units + shift).tolist() for shift in (-1.0, 0.0, 1.0)], seed=0)
    same = bootstrap_mean([units.tolist()] * 3, seed=0)
    assert together.mean == pytest.approx(same.mean)
    assert width(together) > 3 * width(same)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_units_of_one_cluster_count_once() -> None:
    values = [0.5, -0.2, 0.9, 0.1, 0.4]
    repeated = [value for value in values for _ in range(4)]
    alone = bootstrap_mean([values], seed=5)
    clustered = bootstrap_mean([repeated], clusters=[number // 4 for number in range(20)], seed=5)
    assert (clustered.low, clustered.high, clustered.p_value) == pytest.approx((alone.low, alone.high, alone.p_value))
    assert width(bootstrap_mean([repeated], seed=5)) < 0.6 * width(alone)


def test_clusters_weigh_as_much_as_they_have_units() -> None:
    values, clusters = [1.0] * 9 + [0.0], ["a"] * 3 + ["b"] * 6 + ["c"]
    estimate = bootstrap_mean([values], clusters=clusters, seed=0)
    assert estimate.mean == pytest.approx(0.9)
    # Without regard to sizes the three clusters' mean would be 2/3, which would pull the resamples down.
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < 0.9 < estimate.high


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_shares_near_one_are_covered_too(share: float) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for number in range(400):
        trials = (rng.random(50) < share).astype(float).tolist()
        estimate = bootstrap_mean([trials], seed=number, num_resamples=1_000, bounds=(0.0, 1.0))
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        covered += estimate.low <= share <= estimate.high
    assert covered / 400 >= 0.925


def test_three_trials_prove_nothing_however_clear_they_are() -> None:
    few = bootstrap_mean([[1.0] * 3], seed=0, bounds=(-1.0, 1.0))
    many = bootstrap_mean([[1.0] * 30], seed=0, bounds=(-1.0, 1.0))
    assert few.p_value is not None
    assert many.p_value is not None
    assert few.p_value > 0.05
    assert many.p_value < 0.001


def test_an_interval_is_cut_at_the_least_possible_value_and_nothing_else_changes() -> None:
    losses = [[0.01, 0.02, 0.9]]
    free, cut = bootstrap_mean(losses, seed=0), bootstrap_mean(losses, seed=0, least=0.0)
    assert free.low is not None
    assert free.low < 0
    assert cut == replace(free, low=0.0)
    above = [[2.0, 2.1, 2.2]]
    assert bootstrap_mean(above, seed=0, least=0.0) == bootstrap_mean(above, seed=0)


def test_equal_models_are_not_told_apart() -> None:
    estimate = bootstrap_mean([[0.0] * 12] * 2, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
    assert (estimate.p_value, estimate.positive_share) == (1.0, 0.5)


def test_one_unit_tells_nothing_about_others() -> None:
    estimate = bootstrap_mean([[0.4]], seed=0)
    assert estimate.to_dict() == {
        "mean": 0.4,
        "low": None,
        "high": None,
        "p_value": None,
        "positive_share": None,
        "num_units": 1,
        "num_seeds": 1,
    }
    of_one_cluster = bootstrap_mean([[0.4, 0.6]], clusters=["a", "a"], seed=0)
    assert (of_one_cluster.mean, of_one_cluster.low) == (0.5, None)


def test_the_seed_decides_the_resamples() -> None:
    values = [[0.1, 0.5, -0.3, 0.2]]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize("values", [[], [[]], [[1.0, 2.0], [1.0]]])
def test_tables_with_holes_are_refused(values: Any) -> None:
    with pytest.raises(ValueError):
        bootstrap_mean(values, seed=0)


def closed_test(p_values: dict[str, float]) -> dict[str, float]:
    """The closed test with Bonferroni's test of every set of hypotheses: what Holm's procedure is the short form of."""
    sets = list(chain.from_iterable(combinations(p_values, size) for size in range(1, len(p_values) + 1)))
    return {
        name: max(min(1.0, len(found) * min(p_values[other] for other in found)) for found in sets if name in found)
        for name in p_values
    }


def test_holm_is_the_closed_bonferroni_test() -> None:
    rng = np.random.default_rng(2)
    for number in range(50):
        p_values = {f"m{index}": float(p) for index, p in enumerate(rng.random(number % 7 + 1) ** 3)}
        assert holm(p_values) == pytest.approx(closed_test(p_values))
    assert holm({}) == {}


@pytest.mark.parametrize(("num_resamples", "confidence"), [(10, 0.95), (1_000, 1.0), (1_000, 0.2)])
def test_nonsense_settings_are_refused(num_resamples: int, confidence: float) -> None:
    with pytest.raises(InvalidConfigError):
        check_statistics(num_resamples, confidence)
