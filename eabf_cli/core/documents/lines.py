"""The words of a page to lines, cut where the white strip between two columns runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np

from eabf_cli.core.documents.right_to_left import in_leftward_order, is_leftward_line, is_leftward_text
from eabf_cli.core.documents.words import LINE_END_HYPHEN, Word

# In ems, the size of the page's commonest font. A strip of white that columns leave is at least this wide, and ...
_GUTTER_WIDTH = 0.75
# ... this high,
_GUTTER_HEIGHT = 5.5
# (where other pages have a gutter, a line is enough),
_KNOWN_HEIGHT = 1.0
# ... with lines of this many words on both sides: the cells of a table have fewer.
_COLUMN_WORDS = 3
# which are no farther apart than this.
_RUN_GAP = 1.6
# Within a line, words this far apart are cells of a table.
_CELL_GAP = 2.0
# In a narrow column a line may have such gaps, all alike, but not this wide.
_WIDE_GAP = 4.0
# Pieces that are drawn apart are no farther from each other than this, if they are one line.
_SEAM_GAP = 1.5

_IsJoined = Callable[[Word, Word], bool]


@dataclass(slots=True)
class Line:
    """Words on one baseline, within one column.

    Attributes:
        columns: between which gutters it lies: (gutter, side) for each that runs beside it.
        is_leftward: it is read from right to left.
    """

    words: list[Word]
    columns: tuple[tuple[int, int], ...] = ()
    is_leftward: bool = False
    left: float = field(init=False)
    right: float = field(init=False)
    baseline: float = field(init=False)
    size: float = field(init=False)
    order: int = field(init=False)

    def __post_init__(self) -> None:
        self.measure()

    def measure(self) -> None:
        self.left = min(word.left for word in self.words)
        self.right = max(word.right for word in self.words)
        # Indices and footnote marks have sizes and baselines of their own: the longest words tell the line's.
        main = max(self.words, key=lambda word: len(word.text))
        self.baseline, self.size = main.baseline, main.size
        self.order = min(word.order for word in self.words)

    @property
    def text(self) -> str:
        """The words in the order in which they are read, apart by spaces; cells of a table by two."""
        is_row = self.is_row
        words = in_leftward_order(self.words) if self.is_leftward else self.words
        parts = [words[0].text]
        for before, word in pairwise(words):
            gap = max(word.left - before.right, before.left - word.right)
            is_cell = is_row and gap > _CELL_GAP * self.size
            parts += ["  " if is_cell else " ", word.text]
        return "".join(parts)

    @property
    def is_bold(self) -> bool:
        return all(word.is_bold for word in self.words)

    @property
    def is_row(self) -> bool:
        """Whether it looks like the row of a table."""
        gaps = [word.left - before.right for before, word in pairwise(self.words)]
        if not gaps or max(gaps) <= _CELL_GAP * self.size:
            return False
        return len(gaps) == 1 or max(gaps) > min(_WIDE_GAP * self.size, 1.3 * min(gaps))

    @property
    def ends_broken(self) -> bool:
        """Whether a word goes on in the next line."""
        return self.words[-1].text.endswith((LINE_END_HYPHEN, "-")) and len(self.words[-1].text) > 1


@dataclass(frozen=True)
class Gutter:
    """A white strip between columns."""

    left: float
    right: float
    bottom: float
    top: float

    def is_beside(self, baseline: float) -> bool:
        return self.bottom <= baseline <= self.top


def find_gutters(words: Sequence[Word], known: Sequence[float] = ()) -> list[Gutter]:
    """The white strips between the columns of a page.

    Args:
        known: the middles of gutters on other pages: here they may be as short as a line.
    """
    if len(words) < 2 * _COLUMN_WORDS:
        return []
    em = _em(words)
    pieces = [Line(piece) for piece in _pieces(words, lambda before, word: word.left - before.right < 0.6 * em)]
    found: list[Gutter] = []
    for strip in sorted(_white_strips(pieces, em, known), key=lambda strip: strip.bottom - strip.top):
        # Beside a gutter the ends of some short lines leave a lower strip.
        if any(_overlap(strip, gutter) for gutter in found):
            continue
        least = _KNOWN_HEIGHT if _is_known(strip, known) else _GUTTER_HEIGHT
        gutter = _trimmed(strip, pieces, (least - 2) * em)
        if gutter is not None:
            found.append(gutter)
    return found


def find_lines(words: Sequence[Word], gutters: Sequence[Gutter]) -> list[Line]:
    """The lines of a page, in drawing order, none across a gutter."""

    def is_joined(before: Word, word: Word) -> bool:
        return not any(
            gutter.is_beside(word.baseline) and before.right <= gutter.left + 1 and word.left >= gutter.right - 1
            for gutter in gutters
        )

    lines = _joined([Line(piece) for piece in _pieces(words, is_joined)], is_joined)
    on_leftward_page = is_leftward_text(words)
    for line in lines:
        line.is_leftward = is_leftward_line(line.words, on_leftward_page=on_leftward_page)
        line.columns = tuple(_sides(line, gutters))
    return lines


def _em(words: Sequence[Word]) -> float:
    return median(word.size for word in words for _ in word.text)


def _pieces(words: Sequence[Word], is_joined: _IsJoined) -> Iterator[list[Word]]:
    """Runs of words that are drawn one after another from left to right on one baseline."""
    piece: list[Word] = []
    for word in words:
        if piece:
            before = piece[-1]
            size = max(before.size, word.size)
            # An index is lower than the text beside it, an exponent higher.
            is_level = any(_is_level(other, word) for other in (before, max(piece, key=lambda word: word.size)))
            # An index may stand below an exponent.
            goes_on = word.left > min(before.right - 0.5 * size, before.left) - 0.1 * size
            goes_on = goes_on and not before.text.endswith(LINE_END_HYPHEN)
            if not (is_level and goes_on and is_joined(before, word)):
                yield piece
                piece = []
        piece.append(word)
    if piece:
        yield piece


def _is_level(one: Word, two: Word) -> bool:
    return abs(one.baseline - two.baseline) < 0.45 * max(one.size, two.size)


def _joined(lines: list[Line], is_joined: _IsJoined) -> list[Line]:
    """Lines with the pieces put together that are drawn apart, as where a bold word comes after all others."""
    whole: list[Line] = []
    for line in lines:
        for other in reversed(whole):
            if abs(other.baseline - line.baseline) < 0.2 * line.size and _fits_beside(other, line, is_joined):
                other.words = sorted([*other.words, *line.words], key=lambda word: word.left)
                other.measure()
                break
        else:
            whole.append(line)
    return whole


def _fits_beside(line: Line, piece: Line, is_joined: _IsJoined) -> bool:
    words = sorted([*line.words, *piece.words], key=lambda word: word.left)
    pairs = list(pairwise(words))
    if any(word.left < before.right - 0.3 * line.size for before, word in pairs):
        return False
    # On a page turned upside down PDFium gives the pieces of a line from right to left.
    is_drawn_next = piece.order == max(word.order for word in line.words) + 1
    seams = [pair for pair in pairs if (pair[0] in line.words) != (pair[1] in line.words)]
    return all(
        is_joined(before, word) and (is_drawn_next or word.left - before.right < _SEAM_GAP * line.size)
        for before, word in seams
    )


def _white_strips(pieces: Sequence[Line], em: float, known: Sequence[float]) -> Iterator[Gutter]:
    """White strips that are wide and high enough, on a raster of one point."""
    left, bottom = min(piece.left for piece in pieces), min(piece.baseline for piece in pieces) - em
    width = int(max(piece.right for piece in pieces) - left) + 2
    height = int(max(piece.baseline for piece in pieces) - bottom + 2 * em) + 2
    is_text = np.zeros((height, width), bool)
    for piece in pieces:
        low, high = int(piece.baseline - 0.25 * piece.size - bottom), int(piece.baseline + 0.75 * piece.size - bottom)
        is_text[max(low, 0) : high + 1, int(piece.left - left) : int(piece.right - left) + 1] = True
    strip = max(int(_GUTTER_WIDTH * em), 4)
    # [x, y]: whether the strip that begins at x is white at y.
    counts = np.cumsum(np.pad(is_text, ((0, 0), (1, 0))), axis=1, dtype=np.int16)
    is_white = np.pad((counts[:, strip:] == counts[:, :-strip]).T, ((0, 0), (1, 1)))
    edges = is_white[:, 1:] != is_white[:, :-1]
    # In turns the lower and the upper edge of a strip.
    rows, ends = np.divmod(np.flatnonzero(edges), edges.shape[1])
    places, lows, highs = rows[::2], ends[::2], ends[1::2]
    is_known = np.array([any(left + x <= middle <= left + x + strip for middle in known) for x in range(len(edges))])
    least = np.where(is_known, _KNOWN_HEIGHT, _GUTTER_HEIGHT) * em
    is_high = highs - lows >= least[places]
    found = [
        (x, x + strip, low, high)
        for x, low, high in zip(places[is_high].tolist(), lows[is_high].tolist(), highs[is_high].tolist(), strict=True)
    ]
    for x0, x1, low, high in _widest(found):
        yield Gutter(left + x0, left + x1, bottom + low, bottom + high)


def _is_known(strip: Gutter, known: Sequence[float]) -> bool:
    return any(strip.left <= middle <= strip.right for middle in known)


def _overlap(one: Gutter, two: Gutter) -> bool:
    return one.left < two.right and two.left < one.right and one.bottom < two.top and two.bottom < one.top


def _widest(strips: list[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Strips side by side with about the same height made one."""
    merged: list[tuple[int, int, int, int]] = []
    for x0, x1, low, high in strips:
        for index, (m0, m1, m_low, m_high) in enumerate(merged):
            shared = min(high, m_high) - max(low, m_low)
            if x0 <= m1 and shared >= 0.8 * max(high - low, m_high - m_low):
                merged[index] = (m0, max(x1, m1), max(low, m_low), min(high, m_high))
                break
        else:
            merged.append((x0, x1, low, high))
    yield from merged


def _trimmed(strip: Gutter, pieces: Sequence[Line], least_height: float) -> Gutter | None:
    """The part of a strip that has text beside it, if on both sides that is columns of words; else None."""
    beside = [piece for piece in pieces if strip.is_beside(piece.baseline)]
    sides = []
    for side in (
        [piece for piece in beside if piece.right <= strip.left + 1],
        [piece for piece in beside if piece.left >= strip.right - 1],
    ):
        runs = _nearest_runs(side, strip)
        if not runs or median(len(run) for run in runs) < _COLUMN_WORDS:
            return None
        words = [word for run in runs for word in run]
        # The columns of a table of numbers are closer together.
        if sum(word.text[:2].isalpha() for word in words) < 0.4 * len(words):
            return None
        sides.append([word.baseline for word in words])
    if min(map(max, sides)) - max(map(min, sides)) < least_height:
        return None
    # Columns begin and end at different heights: the strip counts as far as one of them reaches.
    return Gutter(strip.left, strip.right, min(map(min, sides)) - 0.5, max(map(max, sides)) + 0.5)


def _nearest_runs(side: Sequence[Line], strip: Gutter) -> list[list[Word]]:
    """On one side of a strip, the words of each row from the strip on, as far as they stand close together."""
    rows: list[list[Line]] = []
    for piece in sorted(side, key=lambda piece: piece.baseline):
        if rows and piece.baseline - rows[-1][0].baseline < 0.4 * piece.size:
            rows[-1].append(piece)
        else:
            rows.append([piece])
    runs = []
    for row in rows:
        row.sort(key=lambda piece: _distance(piece, strip))
        run = list(row[0].words)
        for near, far in pairwise(row):
            if max(near.left - far.right, far.left - near.right) > _RUN_GAP * far.size:
                break
            run += far.words
        runs.append(run)
    return runs


def _distance(piece: Line, gutter: Gutter) -> float:
    return max(gutter.left - piece.right, piece.left - gutter.right)


def _sides(line: Line, gutters: Sequence[Gutter]) -> Iterator[tuple[int, int]]:
    for number, gutter in enumerate(gutters):
        if gutter.is_beside(line.baseline):
            if line.right <= gutter.left + 1:
                yield number, 0
            elif line.left >= gutter.right - 1:
                yield number, 1
