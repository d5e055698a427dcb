"""Slides that are built up step by step: every step is a page, and the last one has all that the others have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from eabf_cli.core.documents.lines import Line

# Steps of one slide are drawn by one program, so that their words differ by rounding alone.
_GRID = 0.5


def unfinished_steps(pages: Sequence[Sequence[Line]]) -> set[int]:
    """Which pages, by their place in the sequence, are at the same places of the next one, which has more.

    A page that is the same as the next one is no step: it may be meant to stand twice.

    Args:
        pages: each page's lines, without what repeats at the edges.
    """
    words = [{_place(word.text, word.left, word.baseline) for line in lines for word in line.words} for lines in pages]
    return {number for number, (page, following) in enumerate(pairwise(words)) if page and page < following}


def _place(text: str, left: float, baseline: float) -> tuple[str, int, int]:
    return text, round(left / _GRID), round(baseline / _GRID)
