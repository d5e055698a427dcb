"""Text that goes round in circles: the same block of tokens over and over."""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 4
MIN_TOKENS = 24
"""What a loop has at least: four repeats, and 24 tokens in all (a row of zeros or dashes is none)."""


def repeated_from(ids: Sequence[int]) -> int | None:
    """Where a block that ids end with begins for the second time; None unless it stands there `MIN_REPEATS` times.

    Of blocks that qualify the shortest counts. The last of its repeats must be complete.
    """
    length = len(ids)
    for size in range(1, length // MIN_REPEATS + 1):
        # The cheap look first: this runs after every token.
        if ids[-1] != ids[-1 - size]:
            continue
        block, repeats = ids[length - size :], 1
        while (start := length - (repeats + 1) * size) >= 0 and ids[start : start + size] == block:
            repeats += 1
        if repeats >= MIN_REPEATS and repeats * size >= MIN_TOKENS:
            return length - (repeats - 1) * size
    return None


def repeating_from(ids: Sequence[int], *, min_tokens: int = 6) -> int | None:
    """Where the end of ids begins to repeat what stands right before it; None if it does not.

    A block that is spelled again up to here, of which there may be more to come: at least `min_tokens` of it, or
    all of a shorter one. Of several such stretches the longest counts.
    """
    length, longest = len(ids), 0
    for size in range(1, length):
        if ids[-1] != ids[-1 - size]:
            continue
        same = 1
        while same < length - size and ids[-1 - same] == ids[-1 - same - size]:
            same += 1
        if same >= min(size, min_tokens):
            longest = max(longest, same)
    return length - longest if longest else None
