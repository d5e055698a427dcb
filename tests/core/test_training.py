"""Training: whole batches, the published optimiser, a loss that falls, and the same weights after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from eabf_cli.core.data import IGNORE_INDEX, Sample, SampleCollator, SampleSet
from eabf_cli.core.patching import apply_method
from eabf_cli.core.recipe import Recipe
from eabf_cli.core.training import DivergedError, has_fast_bfloat16, newest_checkpoint, peak_memory_gib, train
from tests.scalings import scaling_for
from tests.tiny_llama import tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(learning_rate=3e-3, batch_size=4)


def samples(number: int, length: int = 24) -> SampleSet:
    """Rows that count upwards from a different token each."""
    rows = [[1, *(5 + (7 * index + offset) % 50 for offset in range(length - 1))] for index in range(number)]
    return SampleSet(samples=tuple(Sample(row, list(row)) for row in rows), num_available=number, data_hash="")


def small_model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=2, vocab_size=64)


def run(
    model: PreTrainedModel, folder: Path, data: SampleSet, recipe: Recipe = RECIPE, **options: Any
) -> dict[str, Any]:
    given = {"collator": SampleCollator(2), "seed": 42, "mixed_precision": False} | options
    return train(model, data, recipe, folder=folder, **given)


@dataclass(frozen=True)
class RecordingCollator(SampleCollator):
    """Remembers the rows that are asked for, by their second token."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        self.seen.extend(row["input_ids"][1] for row in rows)
        return super().__call__(rows)


def test_an_epoch_is_whole_batches_of_different_samples(tmp_path: Path) -> None:
    collator = RecordingCollator(2)
    result = run(small_model(), tmp_path, samples(10), collator=collator, keep_checkpoints=False)
    # 10 samples in batches of 4: two steps an epoch, two samples wait.
    assert result["num_steps"] == 4
    assert len(result["train_loss"]) == 4
    first, second = collator.seen[:8], collator.seen[8:]
    assert len(first) == len(second) == 8
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert result["num_tokens"] == 16 * 24


def test_the_first_step_is_that_of_a_loop_written_out(tmp_path: Path) -> None:
    data = samples(4)
    expected = small_model().train()
    weights = list(expected.parameters())
    # Weight decay 0.1 is on matrices only: norms are left out by the Trainer.
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(2):
        rows = torch.tensor([sample.input_ids for sample in data.samples])
        logits = expected(rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), rows[:, 1:].reshape(-1))
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            # Cosine from the peak to zero over two steps, without warm-up.
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.step()
        optimizer.zero_grad()

    model = small_model()
    result = run(model, tmp_path, data, keep_checkpoints=False)
    assert result["train_loss"] == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_only_tokens_with_a_label_are_learned_from(tmp_path: Path) -> None:
    data = samples(4)
    half = [Sample(s.input_ids, [IGNORE_INDEX] * 12 + s.labels[12:]) for s in data.samples]
    model = small_model()
    with torch.no_grad():
        rows = torch.tensor([sample.input_ids for sample in half])
        logits = model(rows).logits[:, 11:-1]
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), rows[:, 12:].reshape(-1)).item()
    result = run(model, tmp_path, SampleSet(samples=tuple(half), num_available=4, data_hash=""), keep_checkpoints=False)
    assert result["train_loss"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["eabf", "yarn"])
def test_a_patched_model_learns_and_its_checkpoints_carry_the_method(method: str, tmp_path: Path) -> None:
    model = small_model()
    unscaled = {"unscaled_layers": (0,)} if method == "eabf" else {}
    apply_method(model, scaling_for(method, **unscaled))
    result = run(model, tmp_path, samples(8, length=96), Recipe(learning_rate=5e-3, epochs=4, batch_size=2))
    assert result["train_loss"][-1] < 0.7 * result["train_loss"][0]
    assert not model.training
    assert model.config.use_cache
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert len(names) == 3
    config = json.loads((newest_checkpoint(tmp_path) / "config.json").read_text())  # type: ignore[operator]
    assert (config["model_type"], config["rope_scaling"]["rope_type"]) == (
        ("eabf_llama", "eabf") if method == "eabf" else ("llama", "yarn")
    )


def test_every_step_leaves_a_line(tmp_path: Path) -> None:
    result = run(small_model(), tmp_path, samples(8), keep_checkpoints=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == result["train_loss"]
    assert set(lines[0]) >= {"learning_rate", "grad_norm", "tokens_per_s"}


def test_a_loss_that_is_lost_stops_the_run(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"nan at step 1 of 4.*--learning-rate"):
        run(model, tmp_path, samples(8), keep_checkpoints=False)


def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path: Path) -> None:
    data, recipe = samples(8), Recipe(learning_rate=3e-3, epochs=2, batch_size=2)
    set_seed(42)
    whole = small_model()
    uninterrupted = run(whole, tmp_path / "whole", data, recipe)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert checkpoint.is_dir()
    set_seed(7)
    resumed = small_model()
    result = run(resumed, tmp_path / "resumed", data, recipe, resume_from=checkpoint)
    assert result["train_loss"] == pytest.approx(uninterrupted["train_loss"], rel=1e-6)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-7, rtol=1e-6)


def test_the_newest_checkpoint_is_one_that_was_written_to_its_end(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step, is_whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if is_whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_the_machine_is_asked_for_bfloat16_and_memory() -> None:
    assert isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
    assert not has_fast_bfloat16(torch.device("meta"))
    # This process holds torch: more than 50 MiB, less than all memory.
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64
