"""The control of an extension: the same samples, cut to the window that the model has already."""

from __future__ import annotations

from eabf_cli.core.data.sample_set import IGNORE_INDEX, Sample, SampleSet


def cut_samples(samples: SampleSet, window: int, bos_token_id: int | None) -> SampleSet:
    """Cut every sample into pieces of the original window, each beginning with BOS where samples do.

    Args:
        samples: what the extended model is trained on.
        window: tokens per piece at most.
        bos_token_id: put before each further piece if the samples begin with it.

    Returns:
        all pieces with a loss, in the samples' order; the same tokens but for the added BOS.
    """
    pieces = []
    for sample in samples.samples:
        has_bos = bos_token_id is not None and sample.input_ids[0] == bos_token_id
        ids, labels = sample.input_ids[has_bos:], sample.labels[has_bos:]
        size = window - has_bos
        for begin in range(0, len(ids), size):
            start = [sample.input_ids[0]] if has_bos else []
            piece = Sample(
                start + ids[begin : begin + size],
                [IGNORE_INDEX] * len(start) + labels[begin : begin + size],
                origin=sample.origin,
            )
            if any(label != IGNORE_INDEX for label in piece.labels[1:]):
                pieces.append(piece)
    return SampleSet(samples=tuple(pieces), num_available=samples.num_available, data_hash=samples.data_hash)
