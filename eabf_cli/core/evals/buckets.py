"""Perplexity by position: the loss of every token of long documents, averaged over stretches of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.language_modeling import Document, mean_and_stderr
from eabf_cli.core.evals.rows import Row, Target

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

NUM_BUCKETS = 16


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Stretches of equal width of a row's predicted tokens: 0-based index of the first, and behind the last.

    The token at 0 is predicted by nothing.
    """
    width = math.ceil(length / NUM_BUCKETS)
    edges = [*range(0, length, width), length]
    return [(max(1, start), end) for start, end in pairwise(edges) if end > 1]


def position_rows(documents: Sequence[Document], bos: list[int], lengths: Sequence[int]) -> list[Row]:
    """The documents that fill the longest of the lengths that any fills, with every token a target."""
    fitting = [length for length in lengths if any(len(document) + len(bos) >= length for document in documents)]
    if not fitting:
        return []
    length = max(fitting)
    targets = tuple(Target(("position", *bucket), *bucket) for bucket in position_buckets(length))
    body = length - len(bos)
    return [Row((*bos, *document[:body]), targets) for document in documents if len(document) >= body]


def position_result(scores: Scores) -> list[dict[str, Any]]:
    """One entry per stretch of positions; the standard error is over documents, carried through the exponential."""
    results = []
    for key in sorted(key for key in scores if key[0] == "position"):
        _, start, end = key
        nll, stderr = mean_and_stderr([score.mean_nll for score in scores[key]])
        perplexity = None if nll is None else math.exp(nll)
        results.append(
            {
                "start": start,
                "end": end,
                "perplexity": perplexity,
                "stderr": None if stderr is None or perplexity is None else perplexity * stderr,
                "num_tokens": sum(len(score.nll) for score in scores[key]),
                "num_documents": len(scores[key]),
            }
        )
    return results
