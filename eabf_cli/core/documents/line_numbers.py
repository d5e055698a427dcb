"""Numbers that count the lines in the margin of a manuscript, as reviewers want them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from eabf_cli.core.documents.words import PageWords, Word

# Every line is counted, or one of so many.
_STEPS = (1, 2, 3, 4, 5, 10)
# A count of each line has at least this many numbers on a page; of others there are fewer.
_MIN_NUMBERS = 10
_MIN_STEPPED = 4
# The part of the numbers that goes up by the step, and of the distances that are alike where the numbers are large.
_IN_STEP = 0.75
_ALIKE = 0.6
_TOLERANCE = 0.15
# Numbers smaller than the text by this factor count lines; others, if this part of the pages has them.
_SMALLER = 0.87
_MOST_PAGES = 0.6
# In font sizes: the distance of lines is at most this. Items of a list are farther apart, or unevenly.
_MAX_LEADING = 3.0
# So many words may stand in the margin as well: a running head, a page number.
_MAX_OTHERS = 3
# Numbers are in line with each other up to this, in points.
_IN_LINE = 2.0


@dataclass(frozen=True)
class _Count:
    """Numbers below each other that count lines, or every `step`-th; whether they are smaller than the text."""

    numbers: list[Word]
    step: int
    is_small: bool

    @property
    def first(self) -> int:
        return int(self.numbers[0].text)

    @property
    def next(self) -> int:
        return int(self.numbers[-1].text) + self.step


def without_line_numbers(pages: Sequence[PageWords]) -> list[PageWords]:
    """Pages without the numbers of their lines at the left or right edge.

    Numbers as large as the text may be those of a list or a table, unless most pages have them, each from the
    beginning or from where another ends.
    """
    found = [list(_find_counts(page)) for page in pages]
    ends = {count.next for counts in found for count in counts}
    begins = {count.first for counts in found for count in counts}
    steps = Counter(
        step
        for counts in found
        for step in {c.step for c in counts if c.first <= c.step or c.first in ends or c.next in begins}
    )
    num_needed = max(2, _MOST_PAGES * sum(bool(page.words) for page in pages))
    return [
        _without(page, [count for count in counts if count.is_small or steps[count.step] >= num_needed])
        for page, counts in zip(pages, found, strict=True)
    ]


def _without(page: PageWords, counts: Sequence[_Count]) -> PageWords:
    dropped = {id(word) for count in counts for word in count.numbers}
    return replace(page, words=[word for word in page.words if id(word) not in dropped]) if dropped else page


def _find_counts(page: PageWords) -> Iterator[_Count]:
    """The numbers that count the lines of a page."""
    numbers = [word for word in page.words if word.text.isdecimal() and len(word.text) <= 4]
    if len(numbers) < _MIN_STEPPED:
        return
    size = median(word.size for word in page.words for _ in word.text)
    groups = [(group, step) for group in _in_line(numbers) if (step := _line_step(group, size))]
    outer = [(group, step) for group, step in groups if _is_in_margin(group, page.words)]
    for group, step in groups:
        # Those of the second column may stand between the two.
        if any(step == other and abs(group[0].size - first[0].size) < 0.1 * size for first, other in outer):
            yield _Count(group, step, _is_small(group, size))


def _in_line(numbers: Sequence[Word]) -> Iterator[list[Word]]:
    """Numbers below each other from top to bottom, with their left or right ends in line."""
    for edge in ("right", "left"):
        places = Counter(round(getattr(word, edge) / _IN_LINE) for word in numbers)
        for place, count in places.items():
            if count < _MIN_STEPPED:
                continue
            group = [word for word in numbers if abs(getattr(word, edge) / _IN_LINE - place) <= 1]
            # The number of a heading may stand there, too.
            size = median(word.size for word in group)
            group = [word for word in group if abs(word.size - size) <= 0.1 * size]
            yield sorted(group, key=lambda word: -word.baseline)


def _line_step(numbers: Sequence[Word], size: float) -> int | None:
    """By how much numbers go up, if they do so from line to line of text of this size."""
    steps = Counter(int(below.text) - int(above.text) for above, below in pairwise(numbers))
    step, count = max(steps.items(), key=lambda item: item[1], default=(0, 0))
    if step not in _STEPS or len(numbers) < (_MIN_NUMBERS if step == 1 else _MIN_STEPPED):
        return None
    gaps = [above.baseline - below.baseline for above, below in pairwise(numbers)]
    middle = median(gaps)
    if middle > _MAX_LEADING * size * step or count < _IN_STEP * len(gaps):
        return None
    # A list may be numbered in the margin as well.
    num_alike = sum(abs(gap - middle) <= _TOLERANCE * middle for gap in gaps)
    return step if _is_small(numbers, size) or num_alike >= _ALIKE * len(gaps) else None


def _is_small(numbers: Sequence[Word], size: float) -> bool:
    return numbers[0].size < _SMALLER * size


def _is_in_margin(numbers: Sequence[Word], words: Sequence[Word]) -> bool:
    """Whether hardly a word reaches as far out to the left, or to the right, as the numbers do."""
    own = {id(word) for word in numbers}
    others = [word for word in words if id(word) not in own]
    num_left = sum(word.left < max(number.right for number in numbers) for word in others)
    num_right = sum(word.right > min(number.left for number in numbers) for word in others)
    return min(num_left, num_right) <= _MAX_OTHERS
