"""Running heads, running feet and page numbers: what repeats at the edges of pages."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from eabf_cli.core.documents.lines import Line

# The parts of a page's height, at the top and at the bottom, in which they stand.
_EDGE = 0.13
# At most this many lines on each side.
_MAX_LINES = 3
_NUMBER = re.compile(r"\d+|\b[ivxl]{1,6}\b", re.IGNORECASE)
_PAGE_NUMBER = re.compile(
    r"(?:page\s+)?[-\u2013\u2014]?\s*(\d{1,4})\s*[-\u2013\u2014]?(?:\s*(?:/|of)\s*\d{1,4})?", re.IGNORECASE
)


class PageEdges:
    """Finds what repeats at the edges of some pages.

    Args:
        pages: each page's number (from 0), its height and its lines.
    """

    def __init__(self, pages: Sequence[tuple[int, float, Sequence[Line]]]) -> None:
        places: dict[tuple[str, int], set[int]] = defaultdict(set)
        offsets: Counter[int] = Counter()
        for index, height, lines in pages:
            for line in _edge_lines(height, lines):
                places[_key(line)].add(index)
                if (number := _PAGE_NUMBER.fullmatch(line.text)) is not None:
                    offsets[int(number[1]) - index] += 1
        # On two pages out of hundreds the same words may stand by chance. Of few pages, two have the odd ones' head.
        needed = 2 if len(pages) < 9 else 3
        self._repeated = {key for key, found in places.items() if len(found) >= needed}
        # A lone page's number is known if it is the page's place in the file.
        self._offsets = {offset for offset, count in offsets.items() if count >= 2 or offset == 1}

    def without(self, index: int, height: float, lines: Sequence[Line]) -> list[Line]:
        """A page's lines without the repeated ones; a page with nothing else is left as it is."""
        dropped = {id(line) for line in _edge_lines(height, lines) if self._is_repeated(line, index)}
        kept = [line for line in lines if id(line) not in dropped]
        return kept or list(lines)

    def _is_repeated(self, line: Line, index: int) -> bool:
        number = _PAGE_NUMBER.fullmatch(line.text)
        if number is not None and int(number[1]) - index in self._offsets:
            return True
        return any((key, place) in self._repeated for key, place in _near(_key(line)))


def _edge_lines(height: float, lines: Sequence[Line]) -> Iterator[Line]:
    """The outermost lines of a page at its top and bottom, by rows."""
    for sign in (1, -1):
        rows: list[float] = []
        for line in sorted(lines, key=lambda line: -sign * line.baseline):
            from_edge = height - line.baseline if sign == 1 else line.baseline
            if from_edge > _EDGE * height:
                break
            if not rows or abs(rows[-1] - line.baseline) > 0.5 * line.size:
                rows.append(line.baseline)
            if len(rows) > _MAX_LINES:
                break
            yield line


def _key(line: Line) -> tuple[str, int]:
    """What a line says, numbers aside, and where it stands, in steps of four points."""
    return _NUMBER.sub("#", line.text.lower()), round(line.baseline / 4)


def _near(key: tuple[str, int]) -> Iterator[tuple[str, int]]:
    for step in (-1, 0, 1):
        yield key[0], key[1] + step
