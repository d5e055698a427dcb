"""Perplexity by position is the mean loss of the tokens at these positions."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from eabf_cli.core.evals.buckets import NUM_BUCKETS, position_buckets, position_result, position_rows
from eabf_cli.core.evals.rows import Score


@pytest.mark.parametrize("length", [2, 5, 16, 17, 100, 4096])
def test_stretches_hold_every_predicted_token_once(length: int) -> None:
    buckets = position_buckets(length)
    assert [index for start, end in buckets for index in range(start, end)] == list(range(1, length))
    assert len(buckets) <= NUM_BUCKETS


def test_a_stretch_ends_with_the_window_where_lengths_are_its_multiples() -> None:
    assert position_buckets(4096)[1] == (256, 512)


def test_the_longest_length_that_a_document_fills_is_taken() -> None:
    documents = [list(range(70)), list(range(63)), list(range(42)), list(range(2))]
    rows = position_rows(documents, [1], (16, 64, 128))
    assert [row.input_ids for row in rows[:2]] == [(1, *range(63)), (1, *range(63))]
    assert position_rows(documents, [1], (128,)) == []


def test_a_shorter_document_counts_in_the_stretches_that_it_fills() -> None:
    documents = [list(range(70)), list(range(63)), list(range(42)), list(range(2))]
    rows = position_rows(documents, [1], (16, 64, 128))
    # Stretches of four tokens: 43 fill ten of them, and three fill none.
    assert [row.input_ids for row in rows[2:]] == [(1, *range(39))]
    assert [(target.start, target.end) for target in rows[2].targets] == position_buckets(64)[:10]


def test_the_result_is_a_mean_over_documents() -> None:
    rng = random.Random(0)
    losses = [[rng.uniform(1, 3) for _ in range(4)] for _ in range(3)]
    scores = {
        ("position", 4, 8): [Score(tuple(nll), (False,) * 4) for nll in losses],
        ("position", 1, 4): [Score((1.0, 2.0, 3.0), (False,) * 3)] * 2,
    }
    first, second = position_result(scores)
    assert first == {
        "start": 1,
        "end": 4,
        "perplexity": pytest.approx(math.e**2),
        "stderr": pytest.approx(0),
        "num_tokens": 6,
        "num_documents": 2,
    }
    means = [statistics.fmean(nll) for nll in losses]
    perplexity = math.exp(statistics.fmean(means))
    assert (second["start"], second["end"], second["num_tokens"]) == (4, 8, 12)
    assert second["perplexity"] == pytest.approx(perplexity)
    assert second["stderr"] == pytest.approx(perplexity * statistics.stdev(means) / math.sqrt(3))
