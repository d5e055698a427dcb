"""Rows that are read in chunks, behind what they share with others, have the scores of a forward pass of their own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eabf_cli.core.evals import prefixes, scoring
from eabf_cli.core.evals.prefixes import plan_reading
from eabf_cli.core.evals.rows import Row, Score, Target
from eabf_cli.core.evals.scoring import plan_for, score_plan, score_rows
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_method
from tests.architectures import ARCHITECTURE_CONFIGS, VARIANT_CONFIGS, WINDOW, build_tiny_model
from tests.scalings import scaling_for

UNPATCHABLE = ["mistral_sliding", "cohere2"]
# Nats, and the likeliest token of two that are as likely; float32 in another order of operations.
TOLERANCE = 2e-4


def random_row(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(3, 90), k=length))


def family_of_rows() -> list[Row]:
    """Beginnings that fork before, at and behind the window, a row that others begin with, and strangers."""
    rng = random.Random(0)
    text = random_row(rng, 3 * WINDOW)
    rows = []
    for name, fork in (("early", 10), ("edge", WINDOW), ("late", 3 * WINDOW - 9), ("late too", 3 * WINDOW - 7)):
        ids = (*text[:fork], *random_row(rng, 12))
        rows.append(Row(ids, (Target(("answer", name), fork + 8, fork + 12), Target("text", 2, 9))))
    rows.append(Row(text[:WINDOW], (Target("inside", WINDOW - 6, WINDOW),)))
    rows.append(Row(text, (Target("end", 3 * WINDOW - 5, 3 * WINDOW), Target("across", WINDOW - 4, WINDOW + 4))))
    rows += [Row(random_row(rng, 20), (Target("stranger", 1, 20),)) for _ in range(3)]
    # Another target than the row it is the beginning of, and the same row twice.
    rows.append(Row(text[: WINDOW + 3], (Target("beginning", WINDOW - 1, WINDOW + 3),)))
    rows.append(Row(text, (Target("again", 3 * WINDOW - 5, 3 * WINDOW),)))
    return rows


def scores_of_separate_forwards(model: Any, rows: list[Row]) -> dict[Any, list[Score]]:
    """Every row alone through transformers' own forward, without a cache."""
    scores: dict[Any, list[Score]] = {}
    for row in rows:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits: Tensor = model(ids, use_cache=False).logits[0, :-1].float()
        nll = cross_entropy(logits, ids[0, 1:], reduction="none")
        is_argmax = logits.argmax(-1) == ids[0, 1:]
        for target in row.targets:
            span = slice(target.start - 1, target.end - 1)
            score = Score(tuple(nll[span].tolist()), tuple(is_argmax[span].tolist()))
            scores.setdefault(target.key, []).append(score)
    return scores


def assert_same_scores(found: dict[Any, list[Score]], expected: dict[Any, list[Score]]) -> None:
    assert found.keys() == expected.keys()
    for key, scores in expected.items():
        assert len(found[key]) == len(scores)
        for ours, theirs in zip(found[key], scores, strict=True):
            assert ours.nll == pytest.approx(theirs.nll, abs=TOLERANCE), key
            assert ours.is_argmax == theirs.is_argmax, key


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and shared beginnings of the size of the tiny windows; logits of few tokens at a time."""
    monkeypatch.setattr(scoring, "_MAX_CHUNK_TOKENS", 11)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 5 * 96)
    monkeypatch.setattr(prefixes, "LEAST_SHARED", 6)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", [*ARCHITECTURE_CONFIGS, *VARIANT_CONFIGS, *UNPATCHABLE])
def test_every_architecture_scores_as_in_separate_forwards(name: str) -> None:
    model = build_tiny_model(name)
    if name not in UNPATCHABLE:
        apply_method(model, scaling_for("eabf"))
    rows = family_of_rows()
    plan = plan_for(model, rows, batch_tokens=50)
    assert plan.chain
    assert_same_scores(score_plan(model, plan), scores_of_separate_forwards(model, rows))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_as_in_separate_forwards(method: str) -> None:
    model = build_tiny_model("llama")
    apply_method(model, scaling_for(method))
    rows = sorted(family_of_rows(), key=lambda row: len(row.input_ids))
    plan = plan_for(model, rows, batch_tokens=50)
    # What follows the length of a call cannot share anything with another row.
    assert bool(plan.chain) == (method != "dynamic")
    assert_same_scores(score_plan(model, plan), scores_of_separate_forwards(model, rows))


def test_what_rows_share_is_read_once() -> None:
    rng = random.Random(1)
    text = random_row(rng, 1000)
    rows = [
        Row((*text[:fork], *random_row(rng, 30)), (Target(fork, fork + 25, fork + 30),)) for fork in (900, 500, 900)
    ]
    plan = plan_reading(rows, shares_prefixes=True, batch_tokens=4096)
    assert not plan.batches
    # The last token of a row predicts nothing.
    assert plan.num_tokens == 900 + 29 + 29 + 29
    separate = plan_reading(rows, shares_prefixes=False, batch_tokens=4096)
    assert separate.num_tokens == 2 * 930 + 530
    assert [len(batch[0].input_ids) for batch in separate.batches] == [530, 930]


def test_a_row_that_another_begins_with_costs_nothing() -> None:
    text = random_row(random.Random(2), 300)
    rows = [Row(text[:length], (Target(length, length - 5, length),)) for length in (100, 300, 200)]
    plan = plan_reading(rows, shares_prefixes=True, batch_tokens=4096)
    assert plan.num_tokens == 300
    assert {target.key for _, target in plan.batches[0][0].targets} == {100, 200, 300}


def test_scores_keep_the_order_of_the_rows() -> None:
    model = build_tiny_model("llama")
    rng = random.Random(3)
    rows = [Row((number, *random_row(rng, 20)), (Target("all", 15, 20),)) for number in (9, 3, 7, 5)]
    together = score_rows(model, rows, batch_tokens=1000)["all"]
    one_by_one = [score_rows(model, [row], batch_tokens=1000)["all"][0] for row in rows]
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert ours.nll == pytest.approx(theirs.nll, abs=TOLERANCE)


@pytest.mark.usefixtures("small_steps")
def test_progress_ends_at_the_tokens_of_the_plan() -> None:
    model = build_tiny_model("llama")
    plan = plan_for(model, family_of_rows(), batch_tokens=50)
    calls: list[tuple[int, int]] = []
    score_plan(model, plan, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (plan.num_tokens, plan.num_tokens)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
