"""Accents that a page draws as signs of their own, put onto their letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence

Box = tuple[float, float, float, float]
"""Left, right, bottom and top of what a sign covers, in points."""

_COMBINING = {
    "`": "\u0300",
    "\u02cb": "\u0300",
    "\u00b4": "\u0301",
    "\u02ca": "\u0301",
    "^": "\u0302",
    "\u02c6": "\u0302",
    "~": "\u0303",
    "\u02dc": "\u0303",
    "\u00af": "\u0304",
    "\u02c9": "\u0304",
    "\u02d8": "\u0306",
    "\u02d9": "\u0307",
    "\u00a8": "\u0308",
    "\u02da": "\u030a",
    "\u02dd": "\u030b",
    "\u02c7": "\u030c",
    "\u00b8": "\u0327",
    "\u02db": "\u0328",
} | {chr(code): chr(code) for code in (*range(0x300, 0x305), *range(0x306, 0x30D), 0x327, 0x328)}
_BELOW = frozenset("\u00b8\u02db\u0327\u0328")
_DOTLESS = {"\u0131": "i", "\u0237": "j"}
# PDFium orders the signs of a line by their places, so that an accent may come long before its letter or behind it.
_REACH = 60
# Signs of programs and formulas are accents only right beside the letter.
_NEAR_REACH = 2
# Parts of a letter's width and height by which an accent may be off.
_ASIDE = 0.15
_OVERLAP = 0.4
_DISTANCE = 0.9


def place_accents(characters: Sequence[str], box: Callable[[int], Box]) -> tuple[dict[int, str], set[int]]:
    """The letters that carry an accent drawn apart, and the accents that are thereby used.

    Only pairs that are one character of Unicode are joined, so that the hats of formulas stay what they are.

    Args:
        characters: of a page, in the order of its text layer.
        box: what the character of this index covers.
    """
    letters: dict[int, str] = {}
    used: set[int] = set()
    for index, accent in enumerate(characters):
        if accent not in _COMBINING:
            continue
        for place in _places_around(index, len(characters), _NEAR_REACH if accent.isascii() else _REACH):
            composed = _compose(letters.get(place, characters[place]), accent)
            if composed is not None and _is_on(box(index), box(place), is_below=accent in _BELOW):
                letters[place] = composed
                used.add(index)
                break
    return letters, used


def _places_around(index: int, length: int, reach: int) -> Iterator[int]:
    """Nearest first; TeX draws the letter behind its accent."""
    for distance in range(1, reach + 1):
        yield from (place for place in (index + distance, index - distance) if 0 <= place < length)


def _compose(letter: str, accent: str) -> str | None:
    if not letter.isalpha():
        return None
    composed = unicodedata.normalize("NFC", _DOTLESS.get(letter, letter) + _COMBINING[accent])
    return composed if len(composed) == 1 else None


def _is_on(accent: Box, letter: Box, *, is_below: bool) -> bool:
    left, right, bottom, top = letter
    width, height = right - left, top - bottom
    middle = (accent[0] + accent[1]) / 2
    if not left - _ASIDE * width <= middle <= right + _ASIDE * width:
        return False
    gap = bottom - accent[3] if is_below else accent[2] - top
    return -_OVERLAP * height <= gap <= _DISTANCE * height
