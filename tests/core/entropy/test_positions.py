"""Rules for positions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eabf_cli.core.entropy.positions import check_positions, choose_positions
from eabf_cli.core.errors import InvalidConfigError


@given(length=st.integers(1, 200_000), count=st.integers(1, 300), kind=st.sampled_from(["log", "linear"]))
def test_as_many_distinct_positions_as_asked_for_up_to_the_last(length: int, count: int, kind: str) -> None:
    positions = choose_positions(f"{kind}:{count}", length)
    assert len(positions) == min(count, length)
    assert list(positions) == sorted(set(positions))
    assert positions[0] >= 1
    assert positions[-1] == length


def test_spacing_is_by_logarithm_or_in_equal_steps() -> None:
    logs = [math.log(position) for position in choose_positions("log", 16_384) if position > 200]
    steps = [after - before for before, after in pairwise(logs)]
    assert len(choose_positions("log", 16_384)) == 64
    assert max(steps) < 1.02 * min(steps)
    assert choose_positions("linear:4", 1000) == (250, 500, 750, 1000)


def test_lists_are_sorted_and_distinct_and_all_is_all() -> None:
    assert choose_positions("512,1,512, 9", 512) == (1, 9, 512)
    assert choose_positions((3, 2), 3) == (2, 3)
    assert choose_positions("all", 3) == (1, 2, 3)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("0,5", "position 0 is below 1"),
        ("5,101", "position 101 is beyond the length of 100"),
        ("half", "'half' is none of"),
        ("log:many", "'log:many' is none of"),
        ("", "'' is none of"),
        ((), "no position"),
        ("linear:0", "asks for none"),
    ],
)
def test_refusals_name_the_position(rule: str | tuple[int, ...], said: str) -> None:
    with pytest.raises(InvalidConfigError, match=said):
        choose_positions(rule, 100)
    if "beyond" not in said:
        with pytest.raises(InvalidConfigError, match=said):
            check_positions(rule)
