"""In which order rows are read, so that a beginning which several of them share is read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from eabf_cli.core.evals.rows import Row, Target

LEAST_SHARED = 64
"""Tokens that rows must have in common to be read one behind the other, and not side by side in one batch."""

RankedTarget = tuple[int, Target]
"""A target, and its place among all targets in the order of the rows that were given."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A row to read.

    Attributes:
        targets: what it predicts.
        num_shared: in a chain, how many of its first tokens the reading before it has read already.
    """

    input_ids: tuple[int, ...]
    targets: tuple[RankedTarget, ...]
    num_shared: int = 0

    @property
    def end(self) -> int:
        """Index behind the last token that predicts anything."""
        return max(target.end for _, target in self.targets) - 1

    def positions(self) -> tuple[int, ...]:
        """The positions whose logits predict a token of a target, in order."""
        spans = (range(target.start - 1, target.end - 1) for _, target in self.targets)
        return tuple(sorted({position for span in spans for position in span}))


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """All rows, each to be read once.

    Attributes:
        batches: rows of one length side by side, without a cache, short ones first.
        chain: rows one after the other with one cache, which is cut back to what the next one shares.
    """

    batches: tuple[tuple[Reading, ...], ...]
    chain: tuple[Reading, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model is run on."""
        in_batches = sum(len(reading.input_ids) for batch in self.batches for reading in batch)
        return in_batches + sum(reading.end - reading.num_shared for reading in self.chain)


def plan_reading(rows: Iterable[Row], *, shares_prefixes: bool, batch_tokens: int) -> ReadingPlan:
    """Sort rows into batches and a chain.

    Going through rows in the order of their tokens is a walk through the tree of their beginnings: whatever several
    of them begin with is read once.

    Args:
        shares_prefixes: in a causal model nothing behind a token changes its prediction. Not so where the
            frequencies follow the length of the call (`dynamic`, longrope): there every row is read whole. That
            short rows come first matters to them, too: the frequencies keep to the longest call so far.
        batch_tokens: tokens of a batch, unless a single row has more.
    """
    readings = _distinct(rows)
    if not shares_prefixes:
        return ReadingPlan(batches=tuple(_batches(readings, batch_tokens)), chain=())
    # In descending order of the tokens, a row comes just behind those that begin with it.
    readings = _linked(_without_repeats(sorted(readings, key=lambda reading: reading.input_ids, reverse=True)))
    shared_with_next = [reading.num_shared for reading in readings[1:]] + [0]
    alone: list[Reading] = []
    together: list[Reading] = []
    for reading, num_next in zip(readings, shared_with_next, strict=True):
        is_alone = max(reading.num_shared, num_next) < LEAST_SHARED and len(reading.input_ids) <= batch_tokens
        (alone if is_alone else together).append(replace(reading, num_shared=0))
    return ReadingPlan(batches=tuple(_batches(alone, batch_tokens)), chain=tuple(_linked(together)))


def _distinct(rows: Iterable[Row]) -> list[Reading]:
    """Rows with the same tokens become one, in the order given."""
    targets: dict[tuple[int, ...], list[RankedTarget]] = {}
    rank = 0
    for row in rows:
        found = targets.setdefault(row.input_ids, [])
        for target in row.targets:
            found.append((rank, target))
            rank += 1
    return [Reading(input_ids=ids, targets=tuple(found)) for ids, found in targets.items() if found]


def _without_repeats(readings: Sequence[Reading]) -> list[Reading]:
    """A target that lies in what a row shares with the one before it is predicted there."""
    kept: list[Reading] = []
    carried: list[RankedTarget] = []
    for index in reversed(range(len(readings))):
        reading = readings[index]
        num_shared = _num_common(readings[index - 1], reading) if index else 0
        targets = [*reading.targets, *carried]
        carried = [ranked for ranked in targets if ranked[1].end <= num_shared]
        own = tuple(ranked for ranked in targets if ranked[1].end > num_shared)
        if own:
            kept.append(replace(reading, targets=own))
    return kept[::-1]


def _linked(readings: Sequence[Reading]) -> list[Reading]:
    """The readings of a chain, told what they find in the cache and need not read."""
    linked = list(readings[:1])
    for before, reading in pairwise(readings):
        first = min(target.start for _, target in reading.targets) - 1
        linked.append(replace(reading, num_shared=min(_num_common(before, reading), before.end, first)))
    return linked


def _num_common(first: Reading, second: Reading) -> int:
    """How many tokens both begin with."""
    pairs = zip(first.input_ids, second.input_ids, strict=False)
    shorter = min(len(first.input_ids), len(second.input_ids))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)


def _batches(readings: Sequence[Reading], batch_tokens: int) -> Iterator[tuple[Reading, ...]]:
    """Readings of one length that need the same positions, as many as fit together."""
    # Of the same length, those that were given together lie together.
    ordered = sorted(readings, key=lambda reading: (len(reading.input_ids), reading.targets[0][0]))
    for (length, _), group in groupby(ordered, key=lambda reading: (len(reading.input_ids), reading.positions())):
        members = tuple(group)
        size = max(1, batch_tokens // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]
