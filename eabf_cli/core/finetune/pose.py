"""Positional skip-wise training (PoSE, arXiv 2309.10400): long positions in rows of the short window.

A row holds two chunks of a sample. Between them the position ids skip ahead, so that the second chunk stands
anywhere in the long window while attention runs over the tokens of the short one: memory and time are those of
the short window. A logit scale by position follows the position ids, and needs nothing of its own here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eabf_cli.core.data.sample_set import IGNORE_INDEX, Sample, SampleSet
from eabf_cli.core.data.samples import SampleCollator


def pose_samples(
    samples: SampleSet,
    *,
    window: int,
    target: int,
    bos_token_id: int | None,
    seed: int,
    rows_per_sample: int | None = None,
    epochs: int = 1,
) -> SampleSet:
    """Rows of at most `window` tokens whose position ids reach up to `target`.

    Every row is a function of `seed`, its sample's index and its own number alone. No random state is kept, so a
    run that is resumed sees the rows that it would have seen. Where the chunks lie follows the paper's section
    3.2 with N = 2 chunks: lengths, places in the text (v) and the skip (u) are drawn anew for each row.

    - Skip: the first chunk keeps the positions from 0; u is uniform over all values for which the last position
      is below `target`.
    - Lengths: the split is uniform over all places inside the row.
    - Text: v_0 <= v_1 are drawn independently of u. The authors' code keeps v_0 = 0; here v_0 is drawn as well,
      because several rows come from one sample and would all begin with the same tokens. The second chunk is laid
      around a token with loss, each of them being equally likely: a row without loss would teach nothing, and a
      uniform v_1 nearly never reaches the end of a sample, where answers stand.
    - Labels: those of the sample. The first token of a second chunk that does not continue the first has none
      (the paper keeps it): nothing in the row tells that token, so its loss is noise.

    Args:
        samples: what full-length training would take.
        window: tokens of a row at most, BOS counted; at least 4.
        target: positions stay below it; the extended window.
        bos_token_id: kept at position 0 of every row of the samples that begin with it.
        seed: decides the rows.
        rows_per_sample: rows of a sample longer than `window`; the paper's 1, or None for as many as hold its
            tokens (rounded). A sample that fits is one row, whole, with a skip.
        epochs: passes over the samples, each with rows of its own; train one epoch on the result.

    Returns:
        the rows, pass by pass, in the samples' order; `data_hash` and what was counted are the samples' own.
    """
    rows = []
    for epoch in range(epochs):
        for index, sample in enumerate(samples.samples):
            count = _count_rows(sample, window, rows_per_sample)
            has_bos = bos_token_id is not None and sample.input_ids[0] == bos_token_id
            for number in range(count):
                rng = random.Random(f"pose/{seed}/{index}/{epoch * count + number}")
                rows.append(_draw_row(rng, sample, window, target, has_bos=has_bos))
    return replace(samples, samples=tuple(rows))


@dataclass(frozen=True)
class PoseCollator(SampleCollator):
    """A batch of rows with skipped positions, in which every token sees all tokens before it.

    transformers takes position ids that do not count up by one for several samples packed into one row, and
    lets none see the others (`find_packed_sequence_indices`), but only where there is no attention mask: so
    one is always given, unlike for packed rows.
    """

    def __call__(self, samples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Tensors `input_ids`, `labels`, `attention_mask` and `position_ids`, each (batch, longest row), int64."""
        import torch

        plain = [{name: row for name, row in sample.items() if name != "position_ids"} for sample in samples]
        batch = super().__call__(plain)
        longest = batch["input_ids"].shape[1]
        padded = [sample["position_ids"] + [0] * (longest - len(sample["position_ids"])) for sample in samples]
        return batch | {"position_ids": torch.tensor(padded, dtype=torch.long)}


def _count_rows(sample: Sample, window: int, rows_per_sample: int | None) -> int:
    if len(sample.input_ids) <= window:
        return 1
    return round(len(sample.input_ids) / window) if rows_per_sample is None else rows_per_sample


def _draw_row(rng: random.Random, sample: Sample, window: int, target: int, *, has_bos: bool) -> Sample:
    if len(sample.input_ids) <= window:
        split = rng.randrange(1, len(sample.input_ids))
        row = sample
    else:
        split, row = _draw_chunks(rng, sample, window, has_bos=has_bos)
    length = len(row.input_ids)
    skip = rng.randint(0, target - length)
    position_ids = [*range(split), *range(split + skip, length + skip)]
    return Sample(row.input_ids, row.labels, position_ids, sample.origin)


def _draw_chunks(rng: random.Random, sample: Sample, window: int, *, has_bos: bool) -> tuple[int, Sample]:
    """Two chunks of a sample that is longer than the window, and the length of the first, BOS counted."""
    ids, labels = sample.input_ids[has_bos:], sample.labels[has_bos:]
    size = window - has_bos
    last_place = len(ids) - size
    first_length = rng.randint(1 - has_bos, size - 2)
    anchor = rng.choice([i for i in range(1, len(sample.labels)) if sample.labels[i] != IGNORE_INDEX]) - has_bos
    if anchor > first_length:
        # Behind the second chunk's first token, which may lose its label.
        offset = rng.randint(1, size - first_length - 1)
        second_place = min(max(anchor - first_length - offset, 0), last_place)
        first_place = rng.randint(0, second_place)
    else:
        # So near the beginning that the first chunk has to hold it.
        first_length = max(first_length, anchor + 1)
        first_place, second_place = 0, rng.randint(0, last_place)

    first = slice(first_place, first_place + first_length)
    second = slice(second_place + first_length, second_place + size)
    second_labels = labels[second]
    if first_length > 0 and second_place > first_place:
        second_labels[0] = IGNORE_INDEX
    row = Sample(
        sample.input_ids[:has_bos] + ids[first] + ids[second],
        sample.labels[:has_bos] + labels[first] + second_labels,
    )
    return has_bos + first_length, row
