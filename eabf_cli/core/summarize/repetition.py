"""Text that goes round in circles: the same block of tokens over and over, or a block that only counts up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

MIN_REPEATS = 4
MIN_TOKENS = 24
"""What a loop has at least: four repeats, and 24 tokens in all (a row of zeros or dashes is none)."""
MIN_COUNTING_TOKENS = 48
"""What a block that is the same but for its numbers has, all repeats together: a short row of years is none."""
_NUMBER = -1


def number_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that are digits and nothing else, white space aside."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(
        index for token, index in vocabulary.items() if tokenizer.convert_tokens_to_string([token]).strip().isdigit()
    )


def without_numbers(ids: Sequence[int], numbers: Collection[int]) -> list[int]:
    """Token ids with one and the same in place of each of those numbers."""
    return [_NUMBER if index in numbers else index for index in ids]


def looping_from(ids: Sequence[int], numbers: Collection[int]) -> int | None:
    """Where a loop that ids end with begins its second round: an exact one, or "1. 2. 3. ..." without any words."""
    exact = repeated_from(ids)
    if exact is not None:
        return exact
    return repeated_from(without_numbers(ids, numbers), min_tokens=MIN_COUNTING_TOKENS)


def repeated_from(ids: Sequence[int], *, min_tokens: int = MIN_TOKENS) -> int | None:
    """Where a block that ids end with begins for the second time; None unless it stands there `MIN_REPEATS` times.

    Of blocks that qualify the shortest counts. The last of its repeats must be complete.

    Args:
        min_tokens: what all repeats together have at least.
    """
    length = len(ids)
    for size in range(1, length // MIN_REPEATS + 1):
        # The cheap look first: this runs after every token.
        if ids[-1] != ids[-1 - size]:
            continue
        block, repeats = ids[length - size :], 1
        while (start := length - (repeats + 1) * size) >= 0 and ids[start : start + size] == block:
            repeats += 1
        if repeats >= MIN_REPEATS and repeats * size >= min_tokens:
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
