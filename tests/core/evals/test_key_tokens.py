"""Key tokens are those of the paper's definition, and their loss is that of these tokens alone."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from eabf_cli.core.evals.key_tokens import (
    choosing_contexts,
    find_key_tokens,
    key_losses,
    pooled_mean,
    with_key_tokens,
)
from eabf_cli.core.evals.rows import Score


def score(*nll: float) -> Score:
    return Score(nll, (False,) * len(nll))


@pytest.mark.parametrize(
    ("contexts", "window", "expected"),
    [
        ((128, 256, 512, 1024, 2048), 512, (128, 512)),
        ((1024, 512, 2048), 512, (512, 2048)),
        ((1024, 2048), 512, (1024, 2048)),
        ((512,), 512, None),
        ((), 512, None),
    ],
)
def test_key_tokens_are_chosen_by_the_extremes_inside_the_window(
    contexts: tuple[int, ...], window: int, expected: tuple[int, int] | None
) -> None:
    assert choosing_contexts(contexts, window) == expected


def test_a_key_token_gains_more_than_two_nats_and_ends_above_minus_two() -> None:
    short = [score(5.0, 5.0, 5.0, 1.0), score(9.0, 3.9)]
    # Gains of 3.5, 2 (not above it), 2.5 with too small a likelihood, none; 7.5, 2.4.
    long = [score(1.5, 3.0, 2.5, 1.0), score(1.5, 1.5)]
    assert find_key_tokens(short, long) == ((True, False, False, False), (True, True))


def test_losses_are_of_the_chosen_tokens_alone() -> None:
    scores = {("context", 8): [score(1.0, 2.0, 3.0), score(4.0, 5.0)], ("perplexity", 8): [score(7.0)]}
    losses = key_losses(scores, ((True, False, True), (False, False)))
    assert losses == {8: [(1.0, 3.0), ()]}
    (entry,) = with_key_tokens([{"context": 8, "nll": 3.0}], losses)
    assert (entry["nll"], entry["key_nll"]) == (3.0, 2.0)


def test_no_key_token_has_no_mean() -> None:
    assert pooled_mean([(), ()]) == (None, None)
    assert pooled_mean([(1.0, 2.0)]) == (1.5, None)


def test_the_error_of_the_pooled_mean_is_that_of_a_bootstrap_over_documents() -> None:
    rng = random.Random(0)
    documents = []
    for _ in range(60):
        level = rng.gauss(3, 0.5)
        documents.append(tuple(rng.gauss(level, 0.3) for _ in range(rng.randint(0, 12))))
    mean, stderr = pooled_mean(documents)
    assert mean == pytest.approx(statistics.fmean([nll for document in documents for nll in document]))
    resampled = []
    for _ in range(3000):
        drawn = [value for document in rng.choices(documents, k=60) for value in document]
        resampled.append(statistics.fmean(drawn))
    assert stderr is not None
    assert stderr == pytest.approx(statistics.stdev(resampled), rel=0.1)
    # Much more than if every token had been drawn by itself.
    alone = [nll for document in documents for nll in document]
    assert stderr > 1.5 * statistics.stdev(alone) / math.sqrt(len(alone))
