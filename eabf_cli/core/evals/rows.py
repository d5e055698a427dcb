"""What all measurements are made of: a row of tokens, and the stretches of it that a model has to predict."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A stretch of a row that is scored.

    Attributes:
        key: what its score counts for, such as ("passkey", 2048, 0.5).
        start: index of its first token in the row, at least 1 (nothing predicts the first token).
        end: index behind its last token.
    """

    key: Hashable
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """One forward pass: positions count from 0 at its first token, BOS where the tokenizer has one."""

    input_ids: tuple[int, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Score:
    """How a model predicted one target's tokens, each given all tokens before it in the row.

    Attributes:
        nll: negative log-likelihood of each token, in nats.
        is_argmax: whether the token is the most likely one. All of them true is the same as greedy decoding
            producing the target, since each prediction then has the same tokens before it.
    """

    nll: tuple[float, ...]
    is_argmax: tuple[bool, ...]

    @property
    def mean_nll(self) -> float:
        """Mean over the target's tokens, in nats."""
        return sum(self.nll) / len(self.nll)

    @property
    def is_match(self) -> bool:
        """Whether greedy decoding gives exactly the target."""
        return all(self.is_argmax)

    @property
    def share(self) -> float:
        """Share of the tokens that are predicted, 0 to 1."""
        return sum(self.is_argmax) / len(self.is_argmax)


def merge_rows(rows: Iterable[Row], *, share_prefixes: bool) -> list[Row]:
    """Rows with the same tokens become one, shortest rows first and otherwise in the order given.

    Growing lengths matter for `dynamic` NTK, whose frequencies keep to the longest call so far.

    Args:
        share_prefixes: a row that another begins with is part of that one. In a causal model nothing behind a token
            changes its prediction, unless the frequencies follow the length of the call.
    """
    targets: dict[tuple[int, ...], list[Target]] = {}
    for row in rows:
        targets.setdefault(row.input_ids, []).extend(row.targets)
    merged = [Row(input_ids, tuple(found)) for input_ids, found in targets.items()]
    if share_prefixes:
        merged = _without_prefixes(merged)
    return sorted(merged, key=lambda row: len(row.input_ids))


def _without_prefixes(rows: Sequence[Row]) -> list[Row]:
    """Each row that others begin with gives its targets to one of them."""
    kept: list[Row] = []
    # In the order of their tokens, a row comes just before those that begin with it.
    for row in sorted(rows, key=lambda row: row.input_ids, reverse=True):
        if kept and kept[-1].input_ids[: len(row.input_ids)] == row.input_ids:
            kept[-1] = Row(kept[-1].input_ids, (*kept[-1].targets, *row.targets))
        else:
            kept.append(row)
    order = {row.input_ids: index for index, row in enumerate(rows)}
    return sorted(kept, key=lambda row: order[row.input_ids])
