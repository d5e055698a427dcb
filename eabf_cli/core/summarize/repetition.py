"""Text that goes round in circles: the same block of tokens over and over."""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 4
MIN_TOKENS = 24
"""What a loop has at least: four repeats, and 24 tokens in all (a row of zeros or dashes is none)."""


def repeated_from(ids: Sequence[int], *, min_repeats: int = MIN_REPEATS, min_tokens: int = MIN_TOKENS) -> int | None:
    """Where a block that ids end with begins for the second time; None unless it stands there `min_repeats` times.

    Of blocks that qualify the shortest counts. The last of its repeats must be complete.
    """
    length = len(ids)
    for size in range(1, length // min_repeats + 1):
        # The cheap look first: this runs after every token.
        if ids[-1] != ids[-1 - size]:
            continue
        block, repeats = ids[length - size :], 1
        while (start := length - (repeats + 1) * size) >= 0 and ids[start : start + size] == block:
            repeats += 1
        if repeats >= min_repeats and repeats * size >= min_tokens:
            return length - (repeats - 1) * size
    return None
