"""How sure a difference is: paired bootstrap over documents and seeds, and Holm's correction for many tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with what the bootstrap says about it.

    Attributes:
        mean: over all cells.
        low, high: ends of the two-sided confidence interval; None where one unit tells nothing about others.
        p_value: two-sided, of the mean being zero; None likewise.
        positive_share: share of the resampled means that are positive, ties counted half: how sure it is that
            the mean is above zero; None likewise.
        num_units: documents or trials.
        num_seeds: training runs.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    positive_share: float | None
    num_units: int
    num_seeds: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def bootstrap_mean(
    values: Sequence[Sequence[float]],
    *,
    clusters: Sequence[Any] | None = None,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    bounds: tuple[float, float] | None = None,
    least: float | None = None,
) -> Estimate:
    """Mean of a table of seeds and units (documents, trials), with its bootstrap interval.

    Seeds and units are clusters that cross: every unit is measured under every seed. Both are drawn with
    replacement, each on its own, and a resampled mean is the mean, plus how far the drawn seeds' means are off
    it, plus how far the drawn units' are. Added so, the part of the variance that is neither the seeds' nor the
    units' counts twice, on the safe side (Owen 2007, arXiv 0712.1111, whose resampled cells count it three
    times). The interval is the percentile interval of the resampled means (Efron and Tibshirani 1993, chapter 13).

    Few clusters would make it too narrow: n of them have (n - 1) / n of the variance, and their spread may by
    chance be small. So each deviation is divided by sqrt((n - 1) / n) and by sqrt(chi2 / (n - 1)), chi2 drawn
    with n - 1 degrees of freedom: for normal values that makes it Student's t. Three seeds then say what three
    seeds can say. A single seed says nothing about other seeds, and the interval is then about units alone.

    Args:
        values: (seeds, units); for a paired comparison the differences of two models, cell by cell.
        clusters: the units' clusters, which are drawn as wholes (trials of one prompt); None: each its own.
        seed: decides the resamples.
        bounds: the least and greatest possible value of a cell. Two units are then added for the interval, one at
            each end (as Agresti and Caffo 2000 add trials), because shares of 0 and 1 have no spread that could
            be resampled; the interval stays inside the bounds.
        least: the least possible value of a cell where there is no greatest (0 for a loss). The interval is cut
            there, which leaves its coverage as it is.

    Raises:
        ValueError: rows of different lengths, or no value.
    """
    import numpy as np

    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"expected a table of seeds and units, got the shape {table.shape}")
    num_seeds, num_units = table.shape
    mean = float(table.mean())
    weights, unit_means = _cluster_means(table.mean(axis=0), clusters)
    if bounds is not None:
        weights = np.append(weights, [1.0, 1.0])
        unit_means = np.append(unit_means, bounds)
    if len(unit_means) < 2:
        return Estimate(
            mean=mean, low=None, high=None, p_value=None, positive_share=None,
            num_units=num_units, num_seeds=num_seeds,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    resampled = np.average(unit_means, weights=weights) + _deviations(unit_means, weights, num_resamples, rng)
    if num_seeds > 1:
        resampled += _deviations(table.mean(axis=1), np.ones(num_seeds), num_resamples, rng)
    low, high = map(float, np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2]))
    if bounds is not None:
        low, high = max(bounds[0], min(low, mean)), min(bounds[1], max(high, mean))
    if least is not None:
        low = max(least, low)
    # Rounding must not decide on which side of zero a mean lies that is zero.
    resampled[np.abs(resampled) < 1e-12 * max(1.0, float(np.abs(table).max()))] = 0.0
    at_least, at_most = float((resampled >= 0).mean()), float((resampled <= 0).mean())
    return Estimate(
        mean=mean,
        low=low,
        high=high,
        p_value=min(1.0, 2 * (min(at_least, at_most) * num_resamples + 1) / (num_resamples + 1)),
        positive_share=(at_least + 1 - at_most) / 2,
        num_units=num_units,
        num_seeds=num_seeds,
    )


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjustment (Holm 1979): below the level means significant among all that were tested.

    The k-th smallest of m p-values is multiplied by m - k + 1, and is at least what those before it came to.
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for index, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - index) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def check_statistics(num_resamples: int, confidence: float) -> None:
    """Refuse numbers that give no interval.

    Raises:
        InvalidConfigError: fewer than 100 resamples, or a confidence outside 0.5 to 1.
    """
    if num_resamples < 100:
        raise InvalidConfigError(f"num_resamples must be at least 100, got {num_resamples}")
    if not 0.5 <= confidence < 1:
        raise InvalidConfigError(f"confidence must be from 0.5 to below 1, got {confidence:g}; for example 0.95")


def _cluster_means(values: Array, clusters: Sequence[Any] | None) -> tuple[Array, Array]:
    """How many units each cluster has, and their mean."""
    import numpy as np

    if clusters is None:
        return np.ones(len(values)), values
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[cluster] for cluster in clusters])
    weights = np.bincount(index).astype(np.float64)
    return weights, np.bincount(index, weights=values) / weights


def _deviations(means: Array, weights: Array, num_resamples: int, rng: np.random.Generator) -> Array:
    """(resamples,): how far the weighted mean of clusters drawn with replacement is off that of all, widened to t."""
    import numpy as np

    num_clusters = len(means)
    drawn = rng.integers(num_clusters, size=(num_resamples, num_clusters))
    centred = means - np.average(means, weights=weights)
    deviations = (centred * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    return deviations * np.sqrt(num_clusters / rng.chisquare(num_clusters - 1, num_resamples))
