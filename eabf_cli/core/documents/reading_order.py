"""The lines of a page to blocks, and the blocks in the order in which they are read."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eabf_cli.core.documents.lines import Line

# Lines of one block are at most this many font sizes apart, ...
_LEADING = 1.9
# ... and their sizes differ by no more than this part.
_SIZE_TOLERANCE = 0.12
# A page with more blocks is a drawing with labels all over; its order of drawing is as good as any.
_MAX_SORTED_BLOCKS = 400
_NUM_OPEN_BLOCKS = 60


@dataclass
class Block:
    """Lines below each other in one column."""

    lines: list[Line]

    @property
    def left(self) -> float:
        return min(line.left for line in self.lines)

    @property
    def right(self) -> float:
        return max(line.right for line in self.lines)

    @property
    def top(self) -> float:
        return self.lines[0].baseline + 0.75 * self.lines[0].size

    @property
    def bottom(self) -> float:
        return self.lines[-1].baseline - 0.25 * self.lines[-1].size

    @property
    def size(self) -> float:
        return max(self.lines, key=lambda line: len(line.text)).size


def find_blocks(lines: Sequence[Line]) -> list[Block]:
    """The blocks of a page in reading order."""
    blocks: list[Block] = []
    for line in lines:
        above = [block for block in blocks[-_NUM_OPEN_BLOCKS:] if _is_next(block.lines[-1], line)]
        if above:
            min(above, key=lambda block: block.lines[-1].baseline - line.baseline).lines.append(line)
        else:
            blocks.append(Block([line]))
    return _in_order(blocks)


def _is_next(line: Line, below: Line) -> bool:
    size = max(line.size, below.size)
    return (
        0.3 * size < line.baseline - below.baseline < _LEADING * size
        and abs(line.size - below.size) <= _SIZE_TOLERANCE * size
        and line.columns == below.columns
        and line.left < below.right
        and below.left < line.right
    )


def _in_order(blocks: Sequence[Block]) -> list[Block]:
    """Sort blocks topologically by two rules (Breuel, "High performance document layout analysis", 2003).

    Of two blocks that share a part of the page's width, the upper one is read first. Of two in different columns, the
    left one is, unless between them lies a block that reaches over a part of both; likewise of two beside each other.
    What the rules leave open, such as two short lines in one column, and what contradicts itself, goes by the order of
    drawing.
    """
    if len(blocks) > _MAX_SORTED_BLOCKS:
        return list(blocks)
    sides = [(block.left, block.right, block.bottom, block.top) for block in blocks]
    left, right, bottom, top = np.array(sides, float).reshape(-1, 4).T
    middle = (bottom + top) / 2
    # [a, b] of each matrix is about the blocks a and b.
    shares_width = (left[:, None] < right) & (left < right[:, None])
    overlap = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    is_beside = overlap > 0.5 * np.minimum((top - bottom)[:, None], top - bottom)
    is_above = shares_width & ~is_beside & (middle[:, None] > middle)
    is_parted = np.zeros_like(shares_width)
    for c in range(len(blocks)):
        reaches = shares_width[c]
        is_between = (middle[c] < middle)[:, None] ^ (middle[c] < middle)
        is_parted |= reaches[:, None] & reaches & is_between & (middle != middle[c]) & (middle != middle[c])[:, None]
    is_left = ~shares_width & (right[:, None] <= left) & (_in_other_column(blocks) | is_beside)
    is_before = is_above | (is_left & ~is_parted)
    np.fill_diagonal(is_before, False)
    after = [np.flatnonzero(row).tolist() for row in is_before]
    return [blocks[index] for index in _sorted(after, [block.lines[0].order for block in blocks])]


def _in_other_column(blocks: Sequence[Block]) -> np.ndarray:
    """[a, b]: whether a gutter has block a on its left and b on its right."""
    in_other = np.zeros((len(blocks), len(blocks)), bool)
    sides = [set(block.lines[0].columns) for block in blocks]
    for gutter in {gutter for side in sides for gutter, _ in side}:
        is_left, is_right = (np.array([(gutter, number) in side for side in sides]) for number in (0, 1))
        in_other |= is_left[:, None] & is_right
    return in_other


def _sorted(after: Sequence[Sequence[int]], orders: Sequence[int]) -> list[int]:
    num_before = [0] * len(after)
    for successors in after:
        for index in successors:
            num_before[index] += 1
    ready = [(orders[index], index) for index, count in enumerate(num_before) if count == 0]
    heapq.heapify(ready)
    left = set(range(len(after)))
    result: list[int] = []
    while left:
        # In a circle it goes on with the block that the fewest others claim to precede.
        index = heapq.heappop(ready)[1] if ready else min(left, key=lambda index: (num_before[index], orders[index]))
        if index not in left:
            continue
        left.remove(index)
        result.append(index)
        for successor in after[index]:
            num_before[successor] -= 1
            if num_before[successor] == 0 and successor in left:
                heapq.heappush(ready, (orders[successor], successor))
    return result
