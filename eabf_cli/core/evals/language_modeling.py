"""Loss on documents: perplexity by length, and the loss on the same tokens seen with growing context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.rows import Row, Score, Target

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

Document = Sequence[int]
"""A document's tokens without a begin-of-sequence token."""


def perplexity_rows(documents: Sequence[Document], bos: list[int], length: int, target_tokens: int) -> list[Row]:
    """The first `length` tokens (BOS counted) of each document that has as many; the last ones are scored."""
    num_targets = num_target_tokens(length, target_tokens)
    target = Target(("perplexity", length), length - num_targets, length)
    body = length - len(bos)
    return [Row((*bos, *document[:body]), (target,)) for document in documents if len(document) >= body]


def longest_filled(num_tokens: Iterable[int], lengths: Sequence[int]) -> int | None:
    """The longest of the lengths that a document fills; None where no document fills any.

    Args:
        num_tokens: of each document, BOS counted.
    """
    longest = max(num_tokens, default=0)
    return max((length for length in lengths if length <= longest), default=None)


def context_rows(
    documents: Sequence[Document], bos: list[int], lengths: Sequence[int], target_tokens: int
) -> list[Row]:
    """For each document, the same last tokens of its first `max(lengths)` seen in windows of each length.

    A window of `length` tokens is BOS, then the tokens before the targets as far back as it reaches, then the
    targets; positions count from 0 in each. Documents shorter than the longest window that any document fills
    are left out: a loss at another context would be of other documents, and the difference theirs.
    """
    longest = longest_filled((len(document) + len(bos) for document in documents), lengths)
    if longest is None:
        return []
    fitting = [length for length in lengths if length <= longest]
    num_targets = num_target_tokens(min(fitting), target_tokens)
    end = longest - len(bos)
    return [
        Row(
            (*bos, *document[end - (length - len(bos)) : end]),
            (Target(("context", length), length - num_targets, length),),
        )
        for length in fitting
        for document in documents
        if len(document) >= end
    ]


def num_target_tokens(length: int, target_tokens: int) -> int:
    """Tokens that are scored in a window: at most half of it, so that each has as much before it again."""
    return max(1, min(length // 2, target_tokens))


def perplexity_result(scores: Scores, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One entry per length; perplexity and stderr are None where no document is long enough (one: no stderr).

    The standard error is that of the mean loss over documents, carried through the exponential by the delta
    method: perplexity x stderr(nll). All documents have the same number of scored tokens.
    """
    results = []
    for length in lengths:
        found = scores.get(("perplexity", length), [])
        nll, stderr = mean_and_stderr([score.mean_nll for score in found])
        perplexity = None if nll is None else math.exp(nll)
        results.append(
            {
                "length": length,
                "perplexity": perplexity,
                "stderr": None if stderr is None or perplexity is None else perplexity * stderr,
                "num_tokens": _count_tokens(found),
                "num_documents": len(found),
            }
        )
    return results


def context_result(
    scores: Scores, lengths: Sequence[int], original_max_position_embeddings: int
) -> list[dict[str, Any]]:
    """One entry per context that a document fills: the loss, and its difference to the original window's.

    `difference` (negative: the longer context helps) is paired by document, which makes its standard error
    much smaller than that of the losses. It is taken to the longest context inside the original window, else
    to the shortest.
    """
    measured = [length for length in sorted(lengths) if ("context", length) in scores]
    if not measured:
        return []
    inside = [length for length in measured if length <= original_max_position_embeddings]
    reference = [score.mean_nll for score in scores["context", max(inside, default=measured[0])]]
    results = []
    for context in measured:
        found = scores["context", context]
        losses = [score.mean_nll for score in found]
        nll, stderr = mean_and_stderr(losses)
        difference, difference_stderr = mean_and_stderr([a - b for a, b in zip(losses, reference, strict=True)])
        results.append(
            {
                "context": context,
                "nll": nll,
                "stderr": stderr,
                "num_tokens": _count_tokens(found),
                "num_documents": len(found),
                "difference": difference,
                "difference_stderr": difference_stderr,
            }
        )
    return results


def mean_and_stderr(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error (sample standard deviation over the root of n); None where undefined."""
    mean = fmean(values) if values else None
    return mean, stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _count_tokens(scores: Sequence[Score]) -> int:
    return sum(len(score.nll) for score in scores)
