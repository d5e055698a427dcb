from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, Trainer, TrainingArguments

from eabf_cli.core.data.packing import pack_samples
from eabf_cli.core.data.sample_set import IGNORE_INDEX, Sample, SampleSet, hash_samples
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.patching import apply_method
from tests.architectures import VOCABULARY, WINDOW, build_tiny_model
from tests.scalings import scaling_for

MAX_LENGTH = 4 * WINDOW


def make_samples(lengths: list[int], seed: int = 0) -> SampleSet:
    """Random samples; every other one has its first half without loss."""
    rng = random.Random(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        num_ignored = number % 2 * (length // 2)
        samples.append(Sample(ids, [IGNORE_INDEX] * num_ignored + ids[num_ignored:]))
    return SampleSet(samples=tuple(samples), num_available=len(lengths), data_hash="unpacked")


def split_row(row: Sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(token ids, labels) of each sample in a row, cut where a position is 0."""
    positions = row.position_ids or []
    cuts = [index for index, position in enumerate(positions) if position == 0] + [len(positions)]
    pieces = [slice(start, end) for start, end in pairwise(cuts)]
    assert all(positions[piece] == list(range(piece.stop - piece.start)) for piece in pieces)
    return [(tuple(row.input_ids[piece]), tuple(row.labels[piece])) for piece in pieces]


@given(st.lists(st.integers(2, 50), min_size=1, max_size=40))
def test_packing_loses_nothing_and_fills_rows(lengths: list[int]) -> None:
    samples = make_samples(lengths)
    packed = pack_samples(samples, 50)
    pieces = [piece for row in packed.samples for piece in split_row(row)]
    # A first label is never predicted, alone or in a row.
    expected = [(tuple(s.input_ids), (IGNORE_INDEX, *s.labels[1:])) for s in samples.samples]
    assert sorted(pieces) == sorted(expected)
    assert all(len(row.input_ids) == len(row.labels) == len(row.position_ids or []) <= 50 for row in packed.samples)
    # First fit never leaves two rows that would go into one.
    sizes = sorted(len(row.input_ids) for row in packed.samples)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 50
    assert packed == pack_samples(samples, 50)


def test_a_packed_set_still_counts_samples() -> None:
    samples = make_samples([30, 20, 10, 40, 25])
    packed = pack_samples(samples, 50)
    assert [row.lengths for row in packed.samples] == [[30, 20], [10, 40], [25]]
    assert (len(packed), packed.num_samples, packed.num_tokens) == (3, 5, 125)
    assert packed.tokens_per_sample == samples.tokens_per_sample
    assert packed.summary()["length_histogram"] == samples.summary()["length_histogram"]
    assert (packed.summary()["num_samples"], packed.summary()["num_rows"]) == (5, 3)
    # The same tokens in other rows train otherwise.
    assert len({packed.data_hash, hash_samples(samples.samples), pack_samples(samples, 60).data_hash}) == 3


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="sample of 51 tokens does not fit into rows of 50"):
        pack_samples(make_samples([10, 51]), 50)


def patched(name: str, **options: Any) -> PreTrainedModel:
    model = build_tiny_model(name, **options)
    apply_method(model, scaling_for("eabf"))
    return model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3_text", "smollm3", "qwen3_sliding"])
def test_a_packed_sample_gets_the_logits_of_the_sample_alone(name: str, kernel: str) -> None:
    model = patched(name, attn_implementation=kernel)
    # Beyond the window, where the scale is not 1, and within it; the second row has to be padded.
    samples = make_samples([3 * WINDOW, WINDOW // 2, WINDOW // 4, 2 * WINDOW, WINDOW])
    packed = pack_samples(samples, MAX_LENGTH)
    assert [len(row.lengths) for row in packed.samples] == [2, 3]
    alone = {tuple(sample.input_ids): sample for sample in samples.samples}
    collate = SampleCollator(2)
    rows = [packed[index] for index in range(len(packed))]
    for batch_rows, members in ((rows, packed.samples), (rows[:1], packed.samples[:1])):
        with torch.no_grad():
            logits = model(**collate(batch_rows)).logits
        for row, row_logits in zip(members, logits, strict=True):
            start = 0
            for length in row.lengths:
                piece = slice(start, start + length)
                sample = alone[tuple(row.input_ids[piece])]
                with torch.no_grad():
                    expected = model(torch.tensor([sample.input_ids])).logits[0]
                torch.testing.assert_close(row_logits[piece], expected, atol=1e-5 * expected.abs().max(), rtol=0)
                start += length


def test_the_loss_of_packed_rows_is_that_of_their_samples() -> None:
    """The mean over all trained tokens, with the gradient that goes with it."""
    model = patched("llama")
    samples = make_samples([3 * WINDOW, WINDOW // 2, WINDOW // 4, 2 * WINDOW, WINDOW])
    packed = pack_samples(samples, MAX_LENGTH)
    collate = SampleCollator(2)

    def gradient(rows: SampleSet, size: int) -> torch.Tensor:
        model.zero_grad()
        for begin in range(0, len(rows), size):
            batch = collate([rows[index] for index in range(begin, min(begin + size, len(rows)))])
            logits = model(**batch).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        return model.get_input_embeddings().weight.grad.clone()

    expected = gradient(samples, 1)
    for size in (1, 2):
        torch.testing.assert_close(gradient(packed, size), expected, atol=1e-5 * expected.abs().max(), rtol=0)


def test_rows_that_are_not_packed_keep_their_mask() -> None:
    samples = make_samples([5, 3])
    batch = SampleCollator(2)([samples[0], samples[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "sample_index"}
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 3 + [0] * 2]


def test_the_trainer_sees_the_mean_loss_over_all_trained_tokens(tmp_path: Path, one_thread: None) -> None:
    """Micro-batches of one and of two rows, in transformers' own loop with its own loss."""
    samples = make_samples([3 * WINDOW, WINDOW // 2, WINDOW // 4, 2 * WINDOW, WINDOW])
    model = patched("llama")
    total, count = 0.0, 0
    for sample in samples.samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(sample.labels[1:]), reduction="sum").item()
        count += sum(label != IGNORE_INDEX for label in sample.labels[1:])
    for size in (1, 2):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2 // size,
            num_train_epochs=1,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
        )
        trainer = Trainer(patched("llama"), arguments, SampleCollator(2), pack_samples(samples, MAX_LENGTH))
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)
