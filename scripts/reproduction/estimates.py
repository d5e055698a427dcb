"""How good a variant is, and how two of them differ: for the trials alone, and for seeds and trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cells import Cell
from running import read_cell

from eabf_cli.core.evals.comparisons import LOSSES, Bootstrap, UnitScores
from eabf_cli.core.evals.statistics import Estimate

LOSS = "perplexity"
RETRIEVAL = "retrieval"
"""Unseen needles (on the dev split, one key of several) and repeated spans side by side. Passkeys are not in it: most
methods find all or none of them."""

POSITIONS = "positions"
"""The larger model's loss by position, in quarters of the longest length, each by the index behind its last token."""

_LOSSES = (*LOSSES, POSITIONS)
_BOOTSTRAP = Bootstrap(seed=0)


@dataclass(frozen=True)
class Runs:
    """A variant's results.

    Attributes:
        name: what the document calls it.
        scores: by seed, those that are there.
        num_planned: seeds in all.
    """

    name: str
    scores: Mapping[int, UnitScores]
    num_planned: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A mean with its two uncertainties.

    Attributes:
        trials: of these trained models, over other documents and prompts.
        seeds: over other draws of samples, too; None with one seed.
        num_planned: seeds in all, of which some may be missing yet.
    """

    trials: Estimate
    seeds: Estimate | None
    num_planned: int

    @property
    def num_seeds(self) -> int:
        """Trained models."""
        return 1 if self.seeds is None else self.seeds.num_seeds

    @property
    def mean(self) -> float:
        """Over all seeds and units."""
        return self.trials.mean


def read_runs(cells: Iterable[Cell], folder: Path) -> dict[str, Runs]:
    """The results of an experiment's cells, by the variants' names, in the cells' order."""
    planned: dict[str, list[Cell]] = {}
    for cell in cells:
        planned.setdefault(cell.name, []).append(cell)
    return {
        name: Runs(
            name,
            {cell.seed: unit_scores(result) for cell in found if (result := read_cell(folder, cell)) is not None},
            len(found),
        )
        for name, found in planned.items()
    }


def unit_scores(result: Mapping[str, Any]) -> UnitScores:
    """A run's scores with `RETRIEVAL` among them; trials in the order of their prompts."""
    kept = result["scores"]
    values: dict[str, dict[int, list[float]]] = {}
    clusters: dict[str, dict[int, list[int]]] = {}
    for measurement, by_length in kept["values"].items():
        values[measurement] = {int(length): units for length, units in by_length.items()}
        if measurement not in kept["clusters"]:
            continue
        clusters[measurement] = {}
        for length, units in by_length.items():
            # The wordings' order differs between seeds; the prompts' numbers do not.
            ordered = sorted(zip(kept["clusters"][measurement][length], units, strict=True), key=lambda pair: pair[0])
            clusters[measurement][int(length)] = [cluster for cluster, _ in ordered]
            values[measurement][int(length)] = [value for _, value in ordered]
    parts = ("needles" if "needles" in values else "multi_key", "repeated_span")
    if all(part in values for part in parts):
        lengths = values["repeated_span"]
        values[RETRIEVAL] = {length: [value for part in parts for value in values[part][length]] for length in lengths}
        clusters[RETRIEVAL] = {
            length: [1_000 * number + prompt for number, part in enumerate(parts) for prompt in clusters[part][length]]
            for length in lengths
        }
    if "positions" in kept:
        values[POSITIONS], clusters[POSITIONS] = _quarters(kept["positions"])
    return UnitScores(values, clusters)


def _quarters(positions: Mapping[str, list[float]]) -> tuple[dict[int, list[float]], dict[int, list[int]]]:
    """Each document's loss in four groups of stretches (of equal width), and the documents' numbers."""
    stretches = sorted((tuple(map(int, name.split("-"))), losses) for name, losses in positions.items())
    size = len(stretches) // 4
    values = {}
    for first in range(0, len(stretches), size):
        group = stretches[first : first + size]
        values[group[-1][0][1]] = [sum(losses) / len(losses) for losses in zip(*(x for _, x in group), strict=True)]
    return values, {end: list(range(len(losses))) for end, losses in values.items()}


def level(runs: Runs, measurement: str, length: int) -> Judged | None:
    """A variant's mean loss in nats, or its share of trials; None without a result."""
    rows = [
        (scores.values[measurement][length], _clusters(scores, measurement, length))
        for scores in runs.scores.values()
        if length in scores.values.get(measurement, ())
    ]
    bounds = None if measurement in _LOSSES else (0.0, 1.0)
    return _judged(rows, bounds, runs.num_planned) if rows else None


def difference(a: Runs, b: Runs, measurement: str, length: int, *, b_length: int | None = None) -> Judged | None:
    """`a` minus `b`, paired by seed and by document or trial; None without a seed that both have.

    Args:
        b_length: another length of `b`'s. Its trials are others, so that pairing them means nothing, and costs nothing.
    """
    rows = []
    for seed in sorted(a.scores.keys() & b.scores.keys()):
        mine, theirs = a.scores[seed], b.scores[seed]
        mine_units = mine.values[measurement].get(length)
        theirs_units = theirs.values[measurement].get(b_length or length)
        if mine_units is None or theirs_units is None:
            continue
        clusters = _clusters(mine, measurement, length)
        # Of passkeys, some cells have more than others, the same ones first.
        count = min(len(mine_units), len(theirs_units))
        if (
            clusters is not None
            and clusters[:count] != (_clusters(theirs, measurement, b_length or length) or [])[:count]
        ):
            raise ValueError(f"{a.name} and {b.name} were asked other questions under seed {seed}")
        rows.append(
            (
                [x - y for x, y in zip(mine_units[:count], theirs_units[:count], strict=True)],
                None if clusters is None else clusters[:count],
            )
        )
    bounds = None if measurement in _LOSSES else (-1.0, 1.0)
    return _judged(rows, bounds, min(a.num_planned, b.num_planned)) if rows else None


def _clusters(scores: UnitScores, measurement: str, length: int) -> list[int] | None:
    by_length = scores.clusters.get(measurement)
    return None if by_length is None else list(by_length[length])


def _judged(
    rows: Sequence[tuple[Sequence[float], Sequence[int] | None]],
    bounds: tuple[float, float] | None,
    num_planned: int,
) -> Judged:
    trials, seeds = _bootstrapped(
        tuple(tuple(values) for values, _ in rows),
        tuple(None if clusters is None else tuple(clusters) for _, clusters in rows),
        bounds,
    )
    return Judged(trials=trials, seeds=seeds, num_planned=num_planned)


@cache
def _bootstrapped(
    rows: tuple[tuple[float, ...], ...],
    clusters: tuple[tuple[int, ...] | None, ...],
    bounds: tuple[float, float] | None,
) -> tuple[Estimate, Estimate | None]:
    """Both estimates from each seed's units. Documents are the same under every seed, prompts are each seed's own."""
    if clusters[0] is None:
        pooled = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        prompts = None
    else:
        pooled = [value for row in rows for value in row]
        prompts = [(seed, prompt) for seed, numbers in enumerate(clusters) for prompt in numbers or ()]
    trials = _BOOTSTRAP.mean([pooled], clusters=prompts, bounds=bounds)
    if len(rows) == 1:
        return trials, None
    # Prompts of one number are averaged over the seeds: their spread is then that of so many independent prompts.
    count = min(map(len, rows))
    numbers = None if clusters[0] is None else clusters[0][:count]
    return trials, _BOOTSTRAP.mean([row[:count] for row in rows], clusters=numbers, bounds=bounds)
