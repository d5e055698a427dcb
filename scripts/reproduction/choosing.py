"""Which numbers a method is tuned to, from its runs on the dev split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, TypeVar

from cells import SEEDS, TARGET_WINDOW, WITHIN_TARGET, Cell, tuning
from running import read_cell
from variants import PUBLISHED, TUNED, Variant, tuning_variants

RULE = """For each of its numbers, a method takes the value with the lowest loss on the dev documents, averaged over
512, 1,024 and 2,048 tokens, among those whose retrieval at 2,048 (one key of several, dev prompts) is at most 5 points
below the best value's. The chosen numbers are then put together."""
_MAX_RETRIEVAL_LOSS = 0.05


class Retrieving(Protocol):
    """What has a share of right answers."""

    @property
    def retrieval(self) -> float: ...


R = TypeVar("R", bound=Retrieving)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A value of one number.

    Attributes:
        name: of the variant.
        loss: in nats, averaged over documents and lengths.
        retrieval: share of right answers at the target window.
    """

    name: str
    value: float | None
    loss: float
    retrieval: float


def candidates(method: str, field: str, results: Mapping[str, dict[str, Any]]) -> list[Candidate] | None:
    """The published value of a number and those beside it; None while one of their runs is missing.

    Args:
        results: by variant, what `measure_cell` returned on the dev split.
    """
    variants = tuning_variants(method)
    names = [method, *(name for name in variants if name.startswith(f"{method}-{field}-"))]
    if not all(name in results for name in names):
        return None
    found = []
    for name in names:
        values = results[name]["scores"]["values"]
        losses = [fmean(values["perplexity"][str(length)]) for length in WITHIN_TARGET]
        found.append(
            Candidate(
                name=name,
                value=getattr(variants[name], field),
                loss=fmean(losses),
                retrieval=fmean(values["multi_key"][str(TARGET_WINDOW)]),
            )
        )
    return found


def choose(found: Iterable[Candidate]) -> Candidate:
    """See `RULE`."""
    return min(keeping_retrieval(list(found)), key=lambda candidate: candidate.loss)


def keeping_retrieval(found: Sequence[R]) -> list[R]:
    """Those whose retrieval is at most 5 points below the best's."""
    # Shares are sums of 1/n: rounding must not decide what is exactly 5 points below.
    least = max(candidate.retrieval for candidate in found) - _MAX_RETRIEVAL_LOSS - 1e-9
    return [candidate for candidate in found if candidate.retrieval >= least]


def chosen_variant(method: str, results: Mapping[str, dict[str, Any]]) -> Variant | None:
    """The published variant with the chosen numbers; None while a run is missing."""
    variant = PUBLISHED[method]
    for field in TUNED[method]:
        found = candidates(method, field, results)
        if found is None:
            return None
        changed: dict[str, Any] = {field: choose(found).value}
        variant = replace(variant, **changed)
    return variant


def tuning_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs on the dev split that are there, by variant."""
    return {cell.name: result for cell in tuning() if (result := read_cell(folder, cell)) is not None}


def tuned_cells(folder: Path, seeds: Iterable[int] = SEEDS) -> list[Cell]:
    """The tuned variants as far as they are chosen; one that is as published shares the published one's runs."""
    results = tuning_results(folder)
    chosen = {method: chosen_variant(method, results) for method in TUNED}
    return [
        Cell(name=method if variant == PUBLISHED[method] else f"{method}-tuned", variant=variant, seed=seed)
        for seed in seeds
        for method, variant in chosen.items()
        if variant is not None
    ]
