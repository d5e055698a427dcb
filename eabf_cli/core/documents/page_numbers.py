"""Numbers in the lines at the edges of pages, and which of them count the pages."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

_NUMBER = re.compile(r"\d+|\b[ivxl]{1,7}\b", re.IGNORECASE)
_BARE = re.compile(
    r"(?:page\s+)?[-\u2013\u2014]?\s*(\d{1,4}|[ivxl]{1,7})\s*[-\u2013\u2014]?(?:\s*(?:/|of)\s*\d{1,4})?", re.IGNORECASE
)
_TENS = ("", "x", "xx", "xxx", "xl", "l", "lx", "lxx", "lxxx")
_ONES = ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")
_ROMAN = {tens + ones: 10 * ten + one for ten, tens in enumerate(_TENS) for one, ones in enumerate(_ONES)}
# No line counts its page more often.
_MAX_NUMBERS = 4
# A second count of pages, as an article's beside its volume's, is on about as many pages as the first.
_FEWER = 0.8


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a line: its place there and its value; Roman ones count, too."""

    start: int
    end: int
    value: int


def find_numbers(text: str) -> list[Number]:
    """The numbers of a line."""
    found = ((match, _value(match[0])) for match in _NUMBER.finditer(text))
    return [Number(match.start(), match.end(), value) for match, value in found if value is not None]


def bare_number(text: str) -> int | None:
    """The number of a line that says nothing else, as "12", "- 12 -", "xii" or "Page 12 of 30"."""
    match = _BARE.fullmatch(text)
    return None if match is None else _value(match[1])


def outer_number(text: str) -> int | None:
    """The number that stands apart at an end of a line, as in "12  The Title"; cells are two spaces apart."""
    cells = text.split("  ")
    if len(cells) < 2:
        return None
    numbers = [number for cell in (cells[0], cells[-1]) if (number := bare_number(cell)) is not None]
    return numbers[0] if len(numbers) == 1 else None


def page_offsets(numbers: Iterable[tuple[int, int]]) -> set[int]:
    """What is added to the pages' indices to count them, by the numbers that go up with the pages.

    On a page that has another count already, which goes on over more pages, a number is none: "Case 1", "Case 2" on
    slides 11 and 12.

    Args:
        numbers: (page, number) for each number at the edge of a page.
    """
    pages: dict[int, set[int]] = defaultdict(set)
    for page, number in numbers:
        pages[number - page].add(page)
    pages = {offset: found for offset, found in pages.items() if len(found) >= 2}
    return {offset for offset in pages if not _is_beside_another(offset, pages)}


def masked(text: str, numbers: Iterable[Number], page: int, offsets: set[int]) -> list[str]:
    """What a line says with its page number masked; each way to take it, if several numbers may be the page's."""
    maybe = [number for number in numbers if number.value - page in offsets][:_MAX_NUMBERS]
    ways = (chosen for count in range(len(maybe) + 1) for chosen in combinations(maybe, count))
    return [_with_masks(text, chosen) for chosen in ways]


def _with_masks(text: str, numbers: Iterable[Number]) -> str:
    for number in sorted(numbers, key=lambda number: -number.start):
        text = f"{text[: number.start]}#{text[number.end :]}"
    return text


def _is_beside_another(offset: int, pages: Mapping[int, set[int]]) -> bool:
    own = pages[offset]
    longer = (found for found in pages.values() if len(own) < _FEWER * len(found))
    return any(2 * len(own & found) > len(own) for found in longer)


def _value(text: str) -> int | None:
    return int(text) if text.isdigit() else _ROMAN.get(text.lower())
