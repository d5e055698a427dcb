"""Variable tracking: following the assignments of a prompt by hand gives its answer."""

from __future__ import annotations

import random
import re

import pytest

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.rows import Score
from eabf_cli.core.evals.tracking import (
    CHAIN_LENGTH,
    NUM_CHAINS,
    tracking_result,
    tracking_row,
    tracking_shares,
)
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
FILLER = TOKENIZER("It was a dark and stormy night. " * 20, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_is_what_the_assignments_say(seed: int) -> None:
    row = tracking_row(TOKENIZER, 900, FILLER, random.Random(seed))
    assert len(row.input_ids) == 900
    prompt = TOKENIZER.decode(row.input_ids[: row.targets[0].start])
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", prompt):
        values[name] = values.get(source, source)
    assert len(values) == NUM_CHAINS * CHAIN_LENGTH
    assert len(set(values.values())) == NUM_CHAINS
    (asked,) = re.findall(r"The variables with the value (\d+) are$", prompt)
    expected = [name for name, value in values.items() if value == asked]
    answers = [TOKENIZER.decode(row.input_ids[target.start : target.end]).strip() for target in row.targets]
    assert answers == expected
    assert row.targets[-1].end == len(row.input_ids)


def test_assignments_are_spread_over_the_text() -> None:
    row = tracking_row(TOKENIZER, 3000, FILLER, random.Random(0))
    text = TOKENIZER.decode(row.input_ids)
    places = [match.start() for match in re.finditer("VAR [A-Z]{5} =", text)]
    parts = [round(place / 3000 * NUM_CHAINS * CHAIN_LENGTH) for place in places]
    assert places[0] < 3000 / 6
    assert places[-1] > 3000 * 4 / 6
    assert len(set(parts)) >= 6


def test_a_trial_is_the_share_of_a_chain() -> None:
    right, wrong = Score((0.1,), (True,)), Score((3.0,), (False,))
    found = [right] * CHAIN_LENGTH + [wrong] * (CHAIN_LENGTH - 1) + [right]
    scores = {("variable_tracking", 64): found}
    assert tracking_shares(scores, 64) == [1.0, 1 / CHAIN_LENGTH]
    (entry,) = tracking_result(scores, (32, 64))
    assert entry == {
        "length": 64,
        "accuracy": pytest.approx((1 + 1 / CHAIN_LENGTH) / 2),
        "stderr": pytest.approx((1 - 1 / CHAIN_LENGTH) / 2),
        # Wilson's interval for 1.25 right answers of 2.
        "lower_bound": pytest.approx(0.14169, abs=1e-5),
        "upper_bound": pytest.approx(0.94390, abs=1e-5),
        "num_trials": 2,
    }


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match=r"chains of variables need \d+ tokens, more than 100"):
        tracking_row(TOKENIZER, 100, FILLER, random.Random(0))
