"""Several short samples in one row, each as if it were alone.

Positions start again at 0 with every sample. transformers takes that, in a forward without attention mask and
without cache, as the sign that attention must not cross (`find_packed_sequence_indices` in its
`masking_utils`), and so do rotary embeddings and the logit scale, which know nothing but positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from eabf_cli.core.data.sample_set import IGNORE_INDEX, Sample, SampleSet, hash_samples
from eabf_cli.core.errors import InvalidConfigError


def pack_samples(samples: SampleSet, max_length: int) -> SampleSet:
    """Join samples into rows of at most `max_length` tokens: first-fit decreasing, the same in every process.

    Rows, and the samples within each, are in the order of the samples. The first token of a sample carries no
    loss, since what stands before it is another.

    Args:
        samples: not packed yet.
        max_length: tokens per row at most.

    Raises:
        InvalidConfigError: a sample is longer than a row.
    """
    lengths = [len(sample.input_ids) for sample in samples.samples]
    if max(lengths) > max_length:
        raise InvalidConfigError(f"a sample of {max(lengths):,} tokens does not fit into rows of {max_length:,}")
    rows = tuple(_join([samples.samples[index] for index in row]) for row in _first_fit_decreasing(lengths, max_length))
    return replace(samples, samples=rows, data_hash=hash_samples(rows))


def _first_fit_decreasing(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of what lies in each row: the longest first, each in the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(index)
        room[row] -= lengths[index]
    return sorted(sorted(row) for row in rows)


def _join(samples: Sequence[Sample]) -> Sample:
    return Sample(
        list(chain.from_iterable(sample.input_ids for sample in samples)),
        list(chain.from_iterable([IGNORE_INDEX, *sample.labels[1:]] for sample in samples)),
        list(chain.from_iterable(range(len(sample.input_ids)) for sample in samples)),
        ", ".join(sample.origin for sample in samples if sample.origin),
    )
