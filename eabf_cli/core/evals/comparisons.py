"""Several models on the same documents and trials: how good each is, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eabf_cli.core.evals.statistics import CONFIDENCE, NUM_RESAMPLES, Estimate, bootstrap_mean, holm

LOSSES = ("perplexity", "context_gain", "key_tokens")
"""Measurements whose values are losses (nats per token), the less the better; all others are shares of trials."""

TITLES = {
    "perplexity": "perplexity",
    "context_gain": "loss by visible context",
    "key_tokens": "loss on key tokens",
    "passkey": "passkey",
    "needles": "unseen needles",
    "multi_key": "one key of several",
    "variable_tracking": "variable tracking",
    "repeated_span": "repeated span",
}
"""What measurements are called in texts."""

INSIDE, BEYOND = "inside", "beyond"
"""The lengths up to the original window, and those from there to the target window."""


@dataclass(frozen=True)
class UnitScores:
    """One model's scores, of one training seed.

    Attributes:
        values: by measurement and length, one value per unit (a document, a key token, a trial), in an order that
            all models share.
        clusters: by measurement and length, what each unit belongs to and is drawn with (a token's document, a
            trial's prompt); absent where each unit stands for itself.
    """

    values: Mapping[str, Mapping[int, Sequence[float]]]
    clusters: Mapping[str, Mapping[int, Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How the resamples are drawn."""

    seed: int
    num_resamples: int = NUM_RESAMPLES
    confidence: float = CONFIDENCE

    def mean(self, values: Sequence[Sequence[float]], **options: Any) -> Estimate:
        """See `bootstrap_mean`."""
        return bootstrap_mean(
            values, seed=self.seed, num_resamples=self.num_resamples, confidence=self.confidence, **options
        )


@dataclass(frozen=True)
class _Cell:
    """Units that are tested together: those of one length, or of several."""

    measurement: str
    span: str | None
    lengths: tuple[int, ...]


def interval_entries(seeds: Sequence[UnitScores], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Each measurement of one model at each length, with its interval over seeds and units.

    Args:
        seeds: the model's scores under each training seed.

    Returns:
        `measurement`, `length` and the fields of an `Estimate`; losses are in nats per token.
    """
    entries = []
    for measurement, by_length in seeds[0].values.items():
        for length in by_length:
            cell = _Cell(measurement, None, (length,))
            limits: dict[str, Any] = {"least": 0.0} if measurement in LOSSES else {"bounds": (0.0, 1.0)}
            found = bootstrap.mean(
                [_units(scores, cell) for scores in seeds], clusters=_clusters(seeds[0], cell), **limits
            )
            entries.append({"measurement": measurement, "length": length, **found.to_dict()})
    return entries


def difference_entries(
    models: Mapping[str, Sequence[UnitScores]],
    reference: str,
    bootstrap: Bootstrap,
    *,
    window: int,
    target_window: int,
) -> list[dict[str, Any]]:
    """Every other model against the reference, paired by seed and by document or trial.

    Holm's correction is over all models and lengths of a measurement; over all models and both spans for spans. A
    model of one seed (one that is not trained) is compared with each of the reference's.

    Args:
        models: name to the scores under each seed; all lists of one length, or of length one.
        reference: name of the model that the others are compared with.

    Returns:
        `model`, `reference`, `measurement`, `span` (None for a single length), `lengths`, the fields of an
        `Estimate` of model minus reference, `adjusted_p_value`, and `outcome`: the model is "better" or "worse" than
        the reference, or "open" (with a confidence of 95 % over the whole family, if that is asked for).
    """
    base = models[reference]
    entries = []
    for cells in _families(base[0], window, target_window):
        found = {
            (name, cell): _difference(models[name], base, cell, bootstrap)
            for name in models
            for cell in cells
            if name != reference and _has(models[name], cell)
        }
        adjusted = holm({key: estimate.p_value for key, estimate in found.items() if estimate.p_value is not None})
        for (name, cell), estimate in found.items():
            p_value = adjusted.get((name, cell))
            entries.append(
                {
                    "model": name,
                    "reference": reference,
                    "measurement": cell.measurement,
                    "span": cell.span,
                    "lengths": list(cell.lengths),
                    **estimate.to_dict(),
                    "adjusted_p_value": p_value,
                    "outcome": _outcome(cell.measurement, estimate, p_value, 1 - bootstrap.confidence),
                }
            )
    return entries


def summary_sentences(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the comparisons over spans come to: a sentence for the lengths beyond the window, one for those inside."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["span"] is not None:
            groups.setdefault(entry["span"], []).append(entry)
    return [_sentence(span, groups[span]) for span in (BEYOND, INSIDE) if span in groups]


def _sentence(span: str, entries: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, dict[str, list[str]]] = {"worse": {}, "better": {}}
    for entry in entries:
        if entry["outcome"] in found:
            found[entry["outcome"]].setdefault(entry["model"], []).append(TITLES[entry["measurement"]])
    told = {model for models in found.values() for model in models}
    open_models = [model for model in dict.fromkeys(entry["model"] for entry in entries) if model not in told]
    # A model that is worse than the reference is one that the reference beats.
    parts = [
        f"{words} {_listed([f'{model} ({_listed(names)})' for model, names in found[outcome].items()])}"
        for outcome, words in (("worse", "better than"), ("better", "worse than"))
        if found[outcome]
    ]
    if open_models:
        parts.append(f"not told apart from {_listed(open_models)}")
    lengths = sorted({length for entry in entries for length in entry["lengths"]})
    where = f"{span.capitalize()} the original window (at {_listed([f'{length:,}' for length in lengths])} tokens)"
    return f"{where}, {entries[0]['reference']} is {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- Units ---------------------------------------------------------------------------------------------


def _families(scores: UnitScores, window: int, target_window: int) -> list[list[_Cell]]:
    """The cells that are corrected together."""
    families = []
    for measurement, by_length in scores.values.items():
        lengths = sorted(by_length)
        inside = tuple(length for length in lengths if length <= window)
        beyond = tuple(length for length in lengths if window < length <= target_window)
        spans = [_Cell(measurement, span, found) for span, found in ((INSIDE, inside), (BEYOND, beyond)) if found]
        families += [spans, [_Cell(measurement, None, (length,)) for length in lengths]]
    return families


def _units(scores: UnitScores, cell: _Cell) -> list[float]:
    """A cell's values: a unit's losses averaged over lengths, the trials of all lengths side by side."""
    by_length = scores.values[cell.measurement]
    columns = [by_length[length] for length in cell.lengths]
    if cell.measurement in LOSSES:
        # Documents come the longest first, so those that fill the longest length come first at every length.
        count = min(map(len, columns))
        return [sum(column[unit] for column in columns) / len(columns) for unit in range(count)]
    return [value for column in columns for value in column]


def _clusters(scores: UnitScores, cell: _Cell) -> list[Any] | None:
    """What each of a cell's units is drawn with."""
    clusters = scores.clusters.get(cell.measurement)
    if clusters is None:
        return None
    if cell.measurement in LOSSES:
        return list(clusters[cell.lengths[0]])
    return [(length, cluster) for length in cell.lengths for cluster in clusters[length]]


def _has(seeds: Sequence[UnitScores], cell: _Cell) -> bool:
    return set(cell.lengths) <= set(seeds[0].values.get(cell.measurement, ()))


def _difference(
    model: Sequence[UnitScores], reference: Sequence[UnitScores], cell: _Cell, bootstrap: Bootstrap
) -> Estimate:
    count = max(len(model), len(reference))
    rows = [
        [mine - theirs for mine, theirs in zip(_units(a, cell), _units(b, cell), strict=True)]
        for a, b in zip(_repeated(model, count), _repeated(reference, count), strict=True)
    ]
    bounds = None if cell.measurement in LOSSES else (-1.0, 1.0)
    return bootstrap.mean(rows, clusters=_clusters(reference[0], cell), bounds=bounds)


def _repeated(seeds: Sequence[UnitScores], count: int) -> Sequence[UnitScores]:
    return list(seeds) * count if len(seeds) == 1 else seeds


def _outcome(measurement: str, estimate: Estimate, adjusted_p_value: float | None, level: float) -> str:
    if adjusted_p_value is None or adjusted_p_value > level:
        return "open"
    return "better" if (estimate.mean < 0) == (measurement in LOSSES) else "worse"
