"""Finished training samples: token ids and labels, with what was done to get them."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

IGNORE_INDEX = -100
"""The label of a token without loss, as torch's cross entropy and transformers have it."""

_MAX_BINS = 10


@dataclass(frozen=True)
class Sample:
    """One training row: a sample, or several packed into one.

    Attributes:
        input_ids: the tokens.
        labels: of the same length, `IGNORE_INDEX` where there is no loss.
        position_ids: positions that start again at 0 with every sample of a packed row; None stands for one
            sample, whose positions are 0, 1, 2, ...
        origin: where it comes from ("chats.jsonl, line 12"), for messages; empty if it is not known.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None
    origin: str = ""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample in the row."""
        if self.position_ids is None:
            return [len(self.input_ids)]
        starts = [index for index, position in enumerate(self.position_ids) if position == 0]
        return [end - start for start, end in pairwise([*starts, len(self.input_ids)])]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """The drawn samples and what was done to get them; a map-style dataset for torch and for `Trainer`.

    Attributes:
        samples: the rows in training order, each one sample unless they are packed.
        num_available: records in the dataset.
        data_hash: sha256 of the token ids and labels of all rows, in order, independent of the platform.
        num_truncated: samples that lost their end.
        num_dropped: records (or pieces) left out: too long or too short under "drop", or no loss left within
            `max_length`.
        num_split: records that were cut into several samples.
        num_duplicates: records (or pieces) left out because another has the same tokens.
        num_refused: conversations left out because the chat template refuses them.
        num_short: samples shorter than `min_length`; under "drop" they are among the dropped.
        notes: what a person should know about the data, one sentence each.
    """

    samples: tuple[Sample, ...]
    num_available: int
    data_hash: str
    num_truncated: int = 0
    num_dropped: int = 0
    num_split: int = 0
    num_duplicates: int = 0
    num_refused: int = 0
    num_short: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        row = {"input_ids": sample.input_ids, "labels": sample.labels, "sample_index": [index]}
        return row if sample.position_ids is None else row | {"position_ids": sample.position_ids}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, those in packed rows one by one."""
        return [length for sample in self.samples for length in sample.lengths]

    @property
    def num_samples(self) -> int:
        """Samples, those in packed rows counted one by one; `len()` is the number of rows."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in all samples together."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def tokens_per_sample(self) -> dict[str, int]:
        """Smallest, median and largest sample, in tokens."""
        lengths = self.lengths
        return {"min": min(lengths), "median": round(median(lengths)), "max": max(lengths)}

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return max(len(sample.input_ids) for sample in self.samples)

    @property
    def num_lengths(self) -> int:
        """How many different lengths rows have."""
        return len({len(sample.input_ids) for sample in self.samples})

    def origin(self, index: int) -> str:
        """Where a row comes from, for messages."""
        return self.samples[index].origin or f"sample {index + 1} of {len(self)}"

    def summary(self) -> dict[str, Any]:
        """What a run record says about its data, ready for JSON."""
        return {
            "num_samples": self.num_samples,
            "num_rows": len(self),
            "num_available": self.num_available,
            "num_tokens": self.num_tokens,
            "tokens_per_sample": self.tokens_per_sample,
            "length_histogram": length_histogram(self.lengths),
            "num_truncated": self.num_truncated,
            "num_dropped": self.num_dropped,
            "num_split": self.num_split,
            "num_duplicates": self.num_duplicates,
            "num_refused": self.num_refused,
            "num_short": self.num_short,
            "data_notes": list(self.notes),
            "data_hash": self.data_hash,
        }


def length_histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """How many lengths lie `from` .. `to`, both included, in at most ten bins of one width.

    The width is a power of two and each `to` a multiple of it, so that a bin ends where a window does.
    """
    width = 1
    while (max(lengths) - 1) // width - (min(lengths) - 1) // width >= _MAX_BINS:
        width *= 2
    counts = Counter((length - 1) // width for length in lengths)
    return [
        {"from": index * width + 1, "to": (index + 1) * width, "count": counts[index]}
        for index in range(min(counts), max(counts) + 1)
    ]


def hash_samples(samples: Sequence[Sample]) -> str:
    """sha256 of the tokens, labels and (in packed rows) positions, each as little-endian int64."""
    digest = hashlib.sha256()
    for sample in samples:
        # Lengths in between, so that the same tokens in other samples hash differently.
        for values in ([len(sample.input_ids)], sample.input_ids, sample.labels, sample.position_ids or ()):
            digest.update(_int64_bytes(values))
    return digest.hexdigest()


def hash_tokens(input_ids: Sequence[int]) -> bytes:
    """sha256 of token ids."""
    return hashlib.sha256(_int64_bytes(input_ids)).digest()


def _int64_bytes(values: Sequence[int]) -> bytes:
    data = array("q", values)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()
