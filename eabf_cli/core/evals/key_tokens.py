"""Key tokens: the tokens that long context helps, as LongPPL defines them (arXiv 2410.23771, section 3).

A target token is a key token if a model gives it a log-probability that is higher by more than `LEAST_GAIN` with the
long context than with the short one (the long-short difference, LSD), and one above `LEAST_LOG_PROBABILITY` with the
long one (the long-context likelihood, LCL). The paper lets one strong model choose for all; here that is the model
before its window was extended, on contexts inside that window, where it is at its best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.rows import Score

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

LEAST_GAIN = 2.0
"""Nats: the paper's threshold on LSD."""
LEAST_LOG_PROBABILITY = -2.0
"""Nats: the paper's threshold on LCL."""

KeyTokens = tuple[tuple[bool, ...], ...]
"""Of each document, which of its target tokens are key tokens."""


def choosing_contexts(contexts: Sequence[int], original_max_position_embeddings: int) -> tuple[int, int] | None:
    """The short and the long context that key tokens are told by: the extremes inside the original window.

    With fewer than two contexts inside it, the extremes of all; None with one context in all.
    """
    inside = [context for context in contexts if context <= original_max_position_embeddings]
    chosen = inside if len(inside) > 1 else contexts
    return (min(chosen), max(chosen)) if len(chosen) > 1 else None


def find_key_tokens(short: Sequence[Score], long: Sequence[Score]) -> KeyTokens:
    """The key tokens of each document from its scores under the two contexts."""
    return tuple(
        tuple(
            short_nll - long_nll > LEAST_GAIN and -long_nll > LEAST_LOG_PROBABILITY
            for short_nll, long_nll in zip(short_score.nll, long_score.nll, strict=True)
        )
        for short_score, long_score in zip(short, long, strict=True)
    )


def key_losses(scores: Scores, key_tokens: Sequence[Sequence[bool]]) -> dict[int, list[tuple[float, ...]]]:
    """By visible context, the losses of each document's key tokens, in nats."""
    return {
        key[1]: [
            tuple(nll for nll, is_key in zip(score.nll, chosen, strict=True) if is_key)
            for score, chosen in zip(found, key_tokens, strict=True)
        ]
        for key, found in scores.items()
        if key[0] == "context"
    }


def pooled_mean(values: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """The mean over all values of all documents, and its standard error with documents as the units drawn.

    Documents have different numbers of key tokens, so the mean is a ratio of two sums; its error is the linearised
    one (Cochran, Sampling Techniques, section 6.3). None where undefined.
    """
    total = sum(map(len, values))
    if total == 0:
        return None, None
    mean = sum(map(sum, values)) / total
    used = len(values)
    if used < 2:
        return mean, None
    squares = sum((sum(own) - mean * len(own)) ** 2 for own in values)
    return mean, math.sqrt(squares * used / (used - 1)) / total


def with_key_tokens(
    context_gain: Sequence[dict[str, Any]], losses: dict[int, list[tuple[float, ...]]]
) -> list[dict[str, Any]]:
    """The entries of `context_gain` with the loss on key tokens beside that on all."""
    entries = []
    for entry in context_gain:
        nll, stderr = pooled_mean(losses[entry["context"]])
        entries.append(entry | {"key_nll": nll, "key_stderr": stderr})
    return entries
