"""What all measurements are made of: a row of tokens, and the stretches of it that a model has to predict."""

from __future__ import annotations

from collections.abc import Hashable
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
    """A text to read: positions count from 0 at its first token, BOS where the tokenizer has one."""

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
