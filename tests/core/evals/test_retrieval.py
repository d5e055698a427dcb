from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.prefixes import plan_reading
from eabf_cli.core.evals.retrieval import (
    effective_length,
    eval_templates,
    mean_share_of,
    needle_row,
    passkey_rows,
    span_row,
    wilson_lower_bound,
)
from eabf_cli.core.needles import TEMPLATES
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
FILLER = TOKENIZER("It was a dark and stormy night. " * 20, add_special_tokens=False, verbose=False)["input_ids"]


def entry(length: int, num_right: int, num_trials: int) -> dict[str, Any]:
    bound = wilson_lower_bound(num_right, num_trials)
    return {"length": length, "accuracy": num_right / num_trials, "lower_bound": bound, "num_trials": num_trials}


@pytest.mark.parametrize(
    ("num_right", "num_trials", "z", "bound"),
    [
        # Solutions of (p - share)^2 = z^2 p (1 - p) / n, the smaller root, worked out by hand.
        (10, 10, 2.0, 10 / 14),
        (0, 10, 2.0, 0.0),
        (8, 16, 2.0, 0.5 - 0.1**0.5 * 2**0.5 / 2),
        (8, 10, 1.959964, 0.490162),
    ],
)
def test_wilson_lower_bound(num_right: int, num_trials: int, z: float, bound: float) -> None:
    assert wilson_lower_bound(num_right, num_trials, z) == pytest.approx(bound, abs=1e-6)


def test_the_least_that_proves_ninety_percent_is_25_of_25() -> None:
    assert wilson_lower_bound(24, 24) < 0.9 <= wilson_lower_bound(25, 25)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry(512, 40, 40), entry(1024, 40, 40), entry(2048, 20, 40)], 1024),
        ([entry(256, 40, 40), entry(512, 30, 40), entry(1024, 0, 40)], 512),
        # Ten right answers out of ten prove too little about a longer length.
        ([entry(512, 40, 40), entry(1024, 10, 10)], 512),
        ([entry(512, 0, 40), entry(1024, 40, 40)], None),
        # At 128 the harder half of the questions did not fit; it does not raise what is asked for at 1,024.
        ([entry(128, 20, 20), entry(512, 60, 100), entry(1024, 65, 100)], 1024),
        ([entry(128, 100, 100), entry(512, 60, 100), entry(1024, 75, 100)], 512),
        ([entry(1024, 40, 40)], None),
        ([], None),
    ],
)
def test_effective_length(entries: list[dict[str, Any]], expected: int | None) -> None:
    assert effective_length(entries, 512) == expected


def test_no_template_that_is_asked_may_be_trained_on() -> None:
    names = {template.name for template in eval_templates()}
    assert {template.name for template in TEMPLATES.values() if template.split == "heldout"} < names
    assert not any(template.split == "train" for template in eval_templates())


@pytest.mark.parametrize("length", [1100, 2048])
def test_a_needle_prompt_asks_for_what_it_holds(length: int) -> None:
    row = needle_row(TOKENIZER, length, FILLER, random.Random(3))
    assert len(row.input_ids) == length
    assert row.input_ids[0] == TOKENIZER.bos_token_id
    assert len(row.targets) == len(eval_templates())
    text_ends = None
    for target in row.targets:
        asked = TOKENIZER.decode(row.input_ids[: target.start])
        answer = TOKENIZER.decode(row.input_ids[target.start : target.end])
        template = TEMPLATES[target.key[2]]
        key = next((key for key in _keys(template.question, asked) if key), "")
        assert asked.endswith(template.question.format(key=key))
        if text_ends is None:
            text_ends = target.start - len(template.question.format(key=key))
        statement = template.statement.format(key=key, value=answer.strip())
        assert statement in TOKENIZER.decode(row.input_ids[:text_ends])


def _keys(question: str, asked: str) -> list[str]:
    """What stands for {key} in the question that a text ends with."""
    if "{key}" not in question:
        return [""]
    before, after = question.rsplit("{key}", 1)
    opening = before.rsplit("{key}", 1)[-1]
    return [asked.removesuffix(after).rsplit(opening, 1)[-1]]


def test_spans_stand_in_the_first_quarter_and_are_given_by_half() -> None:
    length = 1024
    row = span_row(TOKENIZER, length, FILLER, random.Random(5))
    assert len(row.input_ids) == length
    for target in row.targets:
        assert target.end - target.start == 12
        span = row.input_ids[target.start - 12 : target.end]
        starts = [i for i in range(length - 24) if row.input_ids[i : i + 24] == span and i != target.start - 12]
        assert len(starts) == 1
        assert starts[0] < length / 4 + 100


def test_passkey_trials_differ_and_go_through_the_depths() -> None:
    rows = passkey_rows(TOKENIZER, 600, (0.0, 0.5, 1.0), 6, seed=1)
    assert len({row.input_ids for row in rows}) == 6
    assert [row.targets[0].key[2] for row in rows] == [0.0, 0.5, 1.0] * 2
    assert {len(row.input_ids) for row in rows} == {600}
    positions = [TOKENIZER.decode(row.input_ids).index("pass key is") for row in rows[:3]]
    assert positions == sorted(positions)
    assert rows != passkey_rows(TOKENIZER, 600, (0.0, 0.5, 1.0), 6, seed=2)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_passkey_prompts_are_read_once_up_to_their_needle(depth: float) -> None:
    rows = passkey_rows(TOKENIZER, 2000, (depth,), 4, seed=1)
    plan = plan_reading(rows, shares_prefixes=True, batch_tokens=4096)
    needle = TOKENIZER.decode(rows[0].input_ids).index(" The pass key is")
    # One byte is one token here; values may begin alike.
    assert needle + 4 * (2000 - needle) - 200 <= plan.num_tokens <= needle + 4 * (2000 - needle)


@pytest.mark.parametrize("make_row", [needle_row, span_row])
def test_prompts_that_do_not_fit_are_refused(make_row: Any) -> None:
    with pytest.raises(InvalidConfigError, match=r"need \d+ tokens, more than 100"):
        make_row(TOKENIZER, 100, FILLER, random.Random(0))


@pytest.mark.parametrize("num_shares", [3, 5, 16])
def test_the_interval_of_a_mean_share_holds_the_true_mean(num_shares: int) -> None:
    rng = np.random.default_rng(0)
    for weights in ([0.9, 0.1, 0, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2], [0.5, 0, 0, 0, 0.5]):
        true_mean = float(np.dot(weights, [0, 0.25, 0.5, 0.75, 1]))
        drawn = rng.choice(5, size=(2000, num_shares), p=weights) / 4
        found = [mean_share_of(shares.tolist()) for shares in drawn]
        held = np.mean([one["lower_bound"] <= true_mean <= one["upper_bound"] for one in found])
        # Wilson's interval for right and wrong answers alone (the last weights) falls short by a few percent.
        assert held >= 0.91
    nothing = mean_share_of([0.0] * num_shares)
    assert nothing["stderr"] == nothing["lower_bound"] == 0 < nothing["upper_bound"]
