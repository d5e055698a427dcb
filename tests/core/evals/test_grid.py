"""Several keys in one text: each row asks for what it holds, and all of them begin alike."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.grid import LEAST_KEYS, multi_key_result, multi_key_rows, needle_grid
from eabf_cli.core.evals.prefixes import plan_reading
from eabf_cli.core.evals.rows import Score
from eabf_cli.core.evals.settings import MOST_DEPTHS, EvalConfig
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
FILLER = TOKENIZER("It was a dark and stormy night. " * 20, add_special_tokens=False, verbose=False)["input_ids"]
STATEMENT = re.compile(r" The pass key of (\w+) is (\d+)\. Remember it\. (\d+) is the pass key of (\w+)\.")


@pytest.mark.parametrize("depths", [(0.0, 0.25, 0.5, 0.75, 1.0), (0.5,)])
def test_each_row_asks_for_the_key_at_its_depth(depths: tuple[float, ...]) -> None:
    length = 1500
    rows = multi_key_rows(TOKENIZER, length, FILLER, depths, random.Random(1))
    assert len(rows) == len(depths)
    for depth, row in zip(depths, rows, strict=True):
        assert len(row.input_ids) <= length
        assert row.input_ids[0] == TOKENIZER.bos_token_id
        (target,) = row.targets
        assert target.key == ("multi_key", length, depth)
        text = TOKENIZER.decode(row.input_ids[: target.start])
        answer = TOKENIZER.decode(row.input_ids[target.start : target.end]).strip()
        (asked,) = re.findall(r"What is the pass key of (\w+)\? The pass key of \1 is$", text)
        facts = {match[1]: (match[2], match.start()) for match in STATEMENT.finditer(text)}
        assert len(facts) == max(LEAST_KEYS, len(depths))
        value, place = facts[asked]
        assert value == answer
        # Behind as large a part of the filler as its depth says.
        filler_before = place - sum(len(match[0]) for match in STATEMENT.finditer(text[:place]))
        num_filler = text.index(" What is") - sum(len(match[0]) for match in STATEMENT.finditer(text))
        assert filler_before == pytest.approx(depth * num_filler, abs=12)
    assert max(len(row.input_ids) for row in rows) == length


def test_the_text_is_read_once_for_all_its_questions() -> None:
    rows = multi_key_rows(TOKENIZER, 2000, FILLER, (0.0, 0.5, 1.0), random.Random(2))
    plan = plan_reading(rows, shares_prefixes=True, batch_tokens=4096)
    assert plan.num_tokens < 2000 + 2 * 80


def test_another_seed_has_other_keys() -> None:
    rows = [multi_key_rows(TOKENIZER, 1000, FILLER, (0.5,), random.Random(seed))[0] for seed in (1, 2)]
    assert rows[0].input_ids != rows[1].input_ids


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match=r"several keys need \d+ tokens, more than 100"):
        multi_key_rows(TOKENIZER, 100, FILLER, (0.5,), random.Random(0))


def test_there_is_a_key_for_as_many_depths_as_may_be_asked_for() -> None:
    depths = tuple(number / MOST_DEPTHS for number in range(MOST_DEPTHS))
    assert len(multi_key_rows(TOKENIZER, 9000, FILLER, depths, random.Random(0))) == MOST_DEPTHS
    with pytest.raises(InvalidConfigError, match="20 depths at most, got 21"):
        EvalConfig(tasks=("multi_key",), depths=(*depths, 1.0))


def test_the_grid_has_the_cells_of_every_task_with_a_depth() -> None:
    right, wrong = Score((0.1,), (True,)), Score((3.0,), (False,))
    scores: dict[Any, list[Score]] = {("multi_key", 64, 0.5): [right, right, wrong], ("multi_key", 64, 1.0): [right]}
    cells = multi_key_result(scores, (32, 64), (0.0, 0.5, 1.0))
    assert [(cell["length"], cell["depth"], cell["num_trials"]) for cell in cells] == [(64, 0.5, 3), (64, 1.0, 1)]
    assert cells[0]["accuracy"] == pytest.approx(2 / 3)
    assert cells[0]["lower_bound"] < 2 / 3 < cells[0]["upper_bound"]
    assert needle_grid({"multi_key": cells, "needles": [{"length": 64}]}) == [
        {"task": "multi_key", **cell} for cell in cells
    ]


def test_a_depth_given_twice_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match=r"depths must differ, got 0.5, 0.5"):
        EvalConfig(depths=(0.5, 0.5))
