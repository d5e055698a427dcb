"""Which variants of the study are confirmed, and the runs that confirm them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cells import TARGET_WINDOW, WINDOW, WITHIN_TARGET, Cell, study, tuning
from choosing import keeping_retrieval, tuned_cells
from running import read_cell
from variants import PUBLISHED, factorial

CONFIRMATION_SEEDS = (45, 46, 47)
"""Draws of samples that nothing else is trained on."""

RULE = """A variant is a candidate if its loss inside the window is at most that of EABF as published, and its
retrieval beyond the window at most 5 points below the best such variant's. Of the candidates, the one with the lowest
loss beyond the window and the one with the highest retrieval at 1,024 to 4,096 tokens are confirmed."""
_BEYOND = tuple(length for length in WITHIN_TARGET if length > WINDOW)
_REACH = (*_BEYOND, 2 * TARGET_WINDOW)
_BASELINE = "eabf"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a variant came to on the dev split.

    Attributes:
        inside, beyond: mean losses, in nats, at the window and beyond it up to the target.
        retrieval, reach: shares found beyond the window, up to the target and up to twice that.
    """

    name: str
    inside: float
    beyond: float
    retrieval: float
    reach: float

    @classmethod
    def of(cls, name: str, result: Mapping[str, Any]) -> Outcome:
        """From what `measure_cell` returned."""
        values = result["scores"]["values"]
        losses = {length: fmean(values["perplexity"][str(length)]) for length in (WINDOW, *_BEYOND)}
        found = {
            length: fmean([*values["multi_key"][str(length)], *values["repeated_span"][str(length)]])
            for length in _REACH
        }
        return cls(
            name=name,
            inside=losses[WINDOW],
            beyond=fmean(losses[length] for length in _BEYOND),
            retrieval=fmean(found[length] for length in _BEYOND),
            reach=fmean(found.values()),
        )


def confirmed_names(outcomes: Iterable[Outcome], baseline: Outcome) -> list[str]:
    """See `RULE`; without a candidate, none."""
    candidates = [outcome for outcome in outcomes if outcome.inside <= baseline.inside]
    if not candidates:
        return []
    candidates = keeping_retrieval(candidates)
    chosen = (
        min(candidates, key=lambda outcome: outcome.beyond),
        max(candidates, key=lambda outcome: outcome.reach),
    )
    return list(dict.fromkeys(outcome.name for outcome in chosen))


def confirmation_cells(folder: Path) -> list[Cell]:
    """The chosen variants and what they have to beat, with samples of their own, on the test split.

    Empty while a run is missing that the choice, or the tuning of EABF, ABF and YaRN, needs.
    """
    cells = dict(zip(factorial(), study(), strict=True))
    results = {name: read_cell(folder, cell) for name, cell in cells.items()}
    baseline = next(read_cell(folder, cell) for cell in tuning() if cell.name == _BASELINE)
    if baseline is None or None in results.values():
        return []
    outcomes = [Outcome.of(name, result) for name, result in results.items() if result is not None]
    chosen = confirmed_names(outcomes, Outcome.of(_BASELINE, baseline))
    rivals = [
        cell
        for cell in tuned_cells(folder, CONFIRMATION_SEEDS)
        if cell.name.removesuffix("-tuned") in ("abf", "yarn", "eabf")
    ]
    if len({cell.name.removesuffix("-tuned") for cell in rivals}) < 3:
        return []
    variants = {_BASELINE: PUBLISHED[_BASELINE]} | {name: factorial()[name] for name in chosen}
    own = [
        Cell(name=name, variant=variant, seed=seed) for seed in CONFIRMATION_SEEDS for name, variant in variants.items()
    ]
    return list({cell.key: cell for cell in (*own, *rivals)}.values())
