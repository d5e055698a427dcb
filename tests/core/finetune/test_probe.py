"""A probe: two real steps at the longest sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from eabf_cli.core.data.samples import Sample, SampleCollator, SampleSet
from eabf_cli.core.finetune.memory import GIB
from eabf_cli.core.finetune.probe import probe
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import peak_memory_gib
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (24, 60, 36)


@dataclass(frozen=True)
class RecordingCollator(SampleCollator):
    """Remembers how long the rows are that are asked for."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        self.seen.extend(len(row["input_ids"]) for row in rows)
        return super().__call__(rows)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 2), (3, 4)])
def test_two_steps_at_the_longest_sample(batch_size: int, rows: int) -> None:
    samples = SampleSet(
        samples=tuple(Sample(ids, list(ids)) for ids in ([1, *range(5, 4 + length)] for length in LENGTHS)),
        num_available=3,
        data_hash="",
    )
    model = tiny_llama(num_hidden_layers=2, vocab_size=64)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    collator = RecordingCollator(2)
    recipe = Recipe(learning_rate=1e-3, epochs=4, batch_size=batch_size)
    result = probe(model, samples, recipe, settings=TrainSettings(seed=1), collator=collator)

    # Two samples stand for any larger batch.
    assert collator.seen == [60] * rows
    assert result.seq_len == 60
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    # 4 epochs of 3 samples with 120 tokens, at the time that a step of `batch_size` rows of 60 takes.
    tokens = 4 * sum(LENGTHS)
    assert result.expected_s == pytest.approx(result.seconds_per_step * tokens / (batch_size * 60))
    assert 0 < result.peak_memory_gib <= peak_memory_gib(torch.device("cpu"))
    assert result.peak_bytes == pytest.approx(result.peak_memory_gib * GIB, abs=1)
    assert set(result.to_dict()) == {"peak_memory_gib", "seq_len", "seconds_per_step", "expected_s"}
