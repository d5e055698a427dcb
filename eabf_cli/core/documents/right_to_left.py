"""Lines of Hebrew, Arabic and other scripts that run from right to left.

PDFium gives the letters of a word in the order in which they are read; the words of a line are told by their places.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby

from eabf_cli.core.documents.words import PageWords, Word

_LISTED_PAGES = 12


def is_leftward_text(words: Iterable[Word]) -> bool:
    """Whether most letters run from right to left."""
    return sum(map(_balance, words)) > 0


def is_leftward_line(words: Sequence[Word], *, on_leftward_page: bool) -> bool:
    """Whether a line is read from right to left: most of it, or on such a page any word."""
    return any(_balance(word) > 0 for word in words) if on_leftward_page else is_leftward_text(words)


def in_leftward_order(words: Sequence[Word]) -> list[Word]:
    """The words of a line from right to left; those of other scripts beside each other keep their own order."""
    ordered: list[Word] = []
    for is_rightward, group in groupby(reversed(words), key=lambda word: _balance(word) < 0):
        run = list(group)
        ordered += reversed(run) if is_rightward else run
    return ordered


def describe_right_to_left(pages: Sequence[PageWords]) -> list[str]:
    """A warning about pages that run from right to left, for which the rest of the layout is not made."""
    found = [page.index + 1 for page in pages if is_leftward_text(page.words)]
    if not found:
        return []
    listed = ", ".join(map(str, found[:_LISTED_PAGES])) + (", ..." if len(found) > _LISTED_PAGES else "")
    plural = "s" * (len(found) > 1)
    return [
        f"{len(found):,} page{plural} ({listed}) run{'' if plural else 's'} from right to left: lines are read so, but "
        "columns and tables are not, and paragraphs may be parted wrongly"
    ]


def _balance(word: Word) -> int:
    """How many more of a word's letters run from right to left than from left to right."""
    if word.text.isascii():
        return -sum(map(str.isalpha, word.text))
    kinds = [unicodedata.bidirectional(character) for character in word.text]
    return sum(kind in ("R", "AL") for kind in kinds) - kinds.count("L")
