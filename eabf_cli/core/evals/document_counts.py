"""How many documents the losses of a result are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

# Keys of a result, what their entries are ordered by, and what to call them.
_MEASUREMENTS = (
    ("perplexity", "length", "perplexity"),
    ("context_gain", "context", "loss by context"),
    ("perplexity_by_position", "end", "perplexity by position"),
)


def documents_told(result: Mapping[str, Any]) -> str:
    """From how many documents each loss of an `evaluate` result is, in words; empty where there is none."""
    counts = {title: list(_counts(result[key], order)) for key, order, title in _MEASUREMENTS if result.get(key)}
    distinct = {count for found in counts.values() for count, _ in found}
    if len(distinct) <= 1:
        return "".join(f"{count:,}" for count in distinct)
    return "; ".join(f"{title} {_told(found)}" for title, found in counts.items() if found)


def _counts(entries: Sequence[Mapping[str, Any]], order: str) -> Iterator[tuple[int, int]]:
    """(documents, longest length in tokens) of each run of lengths with as many documents."""
    for count, group in groupby(entries, key=lambda entry: entry["num_documents"]):
        if count:
            yield count, max(entry[order] for entry in group)


def _told(counts: Sequence[tuple[int, int]]) -> str:
    if len(counts) == 1:
        return f"{counts[0][0]:,}"
    first, *others = (f"{count:,} up to {length:,}" for count, length in counts)
    return ", ".join([f"{first} tokens", *others])
