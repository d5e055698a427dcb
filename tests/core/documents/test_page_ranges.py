from __future__ import annotations

import pytest

from eabf_cli.core.documents.page_ranges import parse_page_ranges
from eabf_cli.core.errors import InvalidConfigError


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (None, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("3", [3]),
        ("1-3,7", [1, 2, 3, 7]),
        ("5-", [5, 6, 7, 8, 9]),
        ("-2", [1, 2]),
        ("7, 2 - 3,3-4", [2, 3, 4, 7]),
        ("9-9", [9]),
    ],
)
def test_ranges_are_pages_in_order_each_once(pages: str | None, expected: list[int]) -> None:
    assert parse_page_ranges(pages, 9, "a.pdf") == [number - 1 for number in expected]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ("10", "a.pdf has 9 pages"),
        ("0", "a.pdf has 9 pages"),
        ("8-10", "a.pdf has 9 pages"),
        ("12-", "a.pdf has 9 pages"),
        ("5-3", "ends before it begins"),
        ("", "no page or range"),
        ("-", "no page or range"),
        ("1,,2", "no page or range"),
        ("two", "'two' is no page or range"),
        ("1-2-3", "no page or range"),
    ],
)
def test_what_is_no_page_is_refused(pages: str, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        parse_page_ranges(pages, 9, "a.pdf")
