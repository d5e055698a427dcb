"""Perplexity by position: the loss of every token of documents, averaged over stretches of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.language_modeling import Document, longest_filled, mean_and_stderr
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
    """Documents with every token a target, up to the longest of the lengths that any fills.

    A shorter document is read as far as it fills stretches of positions; one that fills none is left out.
    """
    length = longest_filled((len(document) + len(bos) for document in documents), lengths)
    if length is None:
        return []
    rows = []
    for document in documents:
        filled = [bucket for bucket in position_buckets(length) if bucket[1] <= len(document) + len(bos)]
        if filled:
            end = filled[-1][1] - len(bos)
            rows.append(
                Row((*bos, *document[:end]), tuple(Target(("position", *bucket), *bucket) for bucket in filled))
            )
    return rows


def position_result(scores: Scores) -> list[dict[str, Any]]:
    """One entry per stretch of positions, from the documents that fill it.

    The standard error is over these documents, carried through the exponential.
    """
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
