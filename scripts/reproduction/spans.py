"""A run's scores by where they are: inside the window, and beyond it up to the target."""

from __future__ import annotations

from collections.abc import Mapping

from cells import TARGET_WINDOW, WINDOW, WITHIN_TARGET
from estimates import LOSS, RETRIEVAL, Runs

from eabf_cli.core.evals.comparisons import UnitScores

BEYOND = tuple(length for length in WITHIN_TARGET if length > WINDOW)


def spanned(runs: Mapping[str, Runs]) -> dict[str, Runs]:
    """The same runs with `spans` of their scores."""
    return {
        name: Runs(found.name, {seed: spans(scores) for seed, scores in found.scores.items()}, found.num_planned)
        for name, found in runs.items()
    }


def spans(scores: UnitScores) -> UnitScores:
    """A run's scores inside the window (under `WINDOW`) and beyond it (under `TARGET_WINDOW`)."""
    losses = [scores.values[LOSS][length] for length in BEYOND]
    trials = [value for length in BEYOND for value in scores.values[RETRIEVAL][length]]
    prompts = [
        10_000 * number + prompt
        for number, length in enumerate(BEYOND)
        for prompt in scores.clusters[RETRIEVAL][length]
    ]
    beyond = [sum(document) / len(document) for document in zip(*losses, strict=True)]
    return UnitScores(
        {
            LOSS: {WINDOW: scores.values[LOSS][WINDOW], TARGET_WINDOW: beyond},
            RETRIEVAL: {WINDOW: scores.values[RETRIEVAL][WINDOW], TARGET_WINDOW: trials},
        },
        {RETRIEVAL: {WINDOW: scores.clusters[RETRIEVAL][WINDOW], TARGET_WINDOW: prompts}},
    )
