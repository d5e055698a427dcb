"""Training: whole batches, the published optimiser, a loss that falls, and the same weights after an interruption."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, set_seed

from eabf_cli.core.data.samples import IGNORE_INDEX, Sample, SampleCollator, SampleSet
from eabf_cli.core.devices import has_fast_bfloat16, peak_memory_gib
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune import training
from eabf_cli.core.finetune.manifest import MANIFEST_FILE, elapsed_at, newest_whole_checkpoint
from eabf_cli.core.finetune.progress import DivergedError
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import TrainResult, micro_steps, train
from eabf_cli.core.patching import apply_method
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


def run(model: PreTrainedModel, folder: Path, data: SampleSet, recipe: Recipe = RECIPE, **options: Any) -> TrainResult:
    given: dict[str, Any] = {"collator": SampleCollator(2)}
    given |= {name: options.pop(name) for name in ("collator", "resume_from") if name in options}
    return train(model, data, recipe, TrainSettings(**options), folder=folder, **given)


@dataclass(frozen=True)
class RecordingCollator(SampleCollator):
    """Remembers the rows that are asked for, by their second token."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        self.seen.extend(row["input_ids"][1] for row in rows)
        return super().__call__(rows)


def test_an_epoch_is_whole_batches_of_different_samples(tmp_path: Path) -> None:
    collator = RecordingCollator(2)
    result = run(small_model(), tmp_path, samples(10), collator=collator)
    # 10 samples in batches of 4: two steps an epoch, two samples wait.
    assert result.num_steps == 4
    assert len(result.losses) == 4
    first, second = collator.seen[:8], collator.seen[8:]
    assert len(first) == len(second) == 8
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert result.num_tokens == 16 * 24


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
    result = run(model, tmp_path, data)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


def test_a_model_that_transformers_would_not_shard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidConfigError, match="does not shard on this device"):
        run(small_model(), tmp_path, samples(8))
    assert list(tmp_path.iterdir()) == []


def test_only_tokens_with_a_label_are_learned_from(tmp_path: Path) -> None:
    data = samples(4)
    half = [Sample(s.input_ids, [IGNORE_INDEX] * 12 + s.labels[12:]) for s in data.samples]
    model = small_model()
    with torch.no_grad():
        rows = torch.tensor([sample.input_ids for sample in half])
        logits = model(rows).logits[:, 11:-1]
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), rows[:, 12:].reshape(-1)).item()
    result = run(model, tmp_path, SampleSet(samples=tuple(half), num_available=4, data_hash=""))
    assert result.losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["eabf", "yarn"])
def test_a_patched_model_learns_and_its_checkpoints_carry_the_method(method: str, tmp_path: Path) -> None:
    model = small_model()
    unscaled = {"unscaled_layers": (0,)} if method == "eabf" else {}
    apply_method(model, scaling_for(method, **unscaled))
    result = run(
        model, tmp_path, samples(8, length=96), Recipe(learning_rate=5e-3, epochs=4, batch_size=2), save_steps=4
    )
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert not model.training
    assert model.config.use_cache
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert len(names) == 3
    config = json.loads((newest_whole_checkpoint(tmp_path) / "config.json").read_text())  # type: ignore[operator]
    assert (config["model_type"], config["rope_scaling"]["rope_type"]) == (
        ("eabf_llama", "eabf") if method == "eabf" else ("llama", "yarn")
    )


def test_every_step_leaves_a_line(tmp_path: Path) -> None:
    result = run(small_model(), tmp_path, samples(8))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == result.losses
    assert set(lines[0]) >= {"learning_rate", "grad_norm", "tokens_per_s"}


def test_a_loss_that_is_lost_stops_the_run_and_names_the_sample(tmp_path: Path) -> None:
    data = samples(8)
    # An embedding that only the sixth sample looks up.
    rows = [replace(row, origin=f"row {index}") for index, row in enumerate(data.samples)]
    rows[5] = replace(rows[5], input_ids=[*rows[5].input_ids[:-1], 63])
    # Untied: the head would spread it to every sample.
    model = tiny_llama(num_hidden_layers=2, vocab_size=64, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = float("nan")
    with pytest.raises(DivergedError, match=r"no number at step [12] of 4, on row 5: .*--learning-rate"):
        run(model, tmp_path, replace(data, samples=tuple(rows)))


def test_a_loss_that_runs_away_stops_the_run(tmp_path: Path) -> None:
    # Steps of this size throw the weights far from any minimum.
    with pytest.raises(DivergedError, match=r"diverges: .* at step \d+ of 16.*--learning-rate"):
        run(small_model(), tmp_path, samples(16), Recipe(learning_rate=0.99, epochs=4, batch_size=4))


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_the_training_with_a_checkpoint_and_a_second_one_at_once(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(folder: Path, line: dict[str, Any]) -> None:
        for _ in range(times if line["step"] == 1 else 0):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("eabf_cli.core.finetune.progress.append_metrics", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 4, with a checkpoint" if times == 1 else "^$"):
        run(small_model(), tmp_path, samples(8), save_steps=100)
    assert signal.getsignal(signal.SIGTERM) is before
    saved = newest_whole_checkpoint(tmp_path)
    assert (saved and saved.name) == ("checkpoint-2" if times == 1 else None)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_run_that_goes_on_ends_with_the_same_weights_to_the_bit(mixed_precision: bool, tmp_path: Path) -> None:
    data, recipe = samples(8), Recipe(learning_rate=3e-3, epochs=2, batch_size=2)
    options: dict[str, Any] = {"mixed_precision": mixed_precision, "save_steps": 3}
    set_seed(42)
    whole = small_model()
    uninterrupted = run(whole, tmp_path / "whole", data, recipe, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    assert checkpoint.is_dir()
    set_seed(7)
    resumed = small_model()
    result = run(resumed, tmp_path / "resumed", data, recipe, resume_from=checkpoint, **options)
    assert result.losses == uninterrupted.losses
    assert result.num_tokens == uninterrupted.num_tokens
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_the_time_of_earlier_attempts_counts(tmp_path: Path) -> None:
    data, recipe = samples(8), Recipe(learning_rate=3e-3, epochs=2, batch_size=2)
    run(small_model(), tmp_path / "whole", data, recipe, save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert 0 < manifest["elapsed"]["train_s"] == manifest["elapsed"]["wall_s"]
    manifest["elapsed"] = {"train_s": 500.0, "wall_s": 1000.0}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    result = run(small_model(), tmp_path / "resumed", data, recipe, save_steps=3, resume_from=checkpoint)
    assert 500 < result.wall_s < 1000
    assert result.tokens_per_s == pytest.approx(16 * 24 / result.wall_s)
    assert 500 < elapsed_at(tmp_path / "resumed" / "checkpoint-8").train_s <= result.wall_s


def test_freed_memory_is_given_back_between_rows_of_different_lengths_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr("eabf_cli.core.finetune.training.give_back_freed_memory", lambda: calls.append(None))
    recipe = Recipe(learning_rate=3e-3, epochs=1, batch_size=2)
    run(small_model(), tmp_path / "level", samples(4), recipe)
    assert calls == []
    rows = (*samples(2).samples, *samples(2, length=20).samples)
    run(small_model(), tmp_path / "mixed", replace(samples(4), samples=rows), recipe)
    # Two steps of two rows.
    assert len(calls) == 4


@given(micro_batch_size=st.integers(1, 6), replicas=st.integers(1, 6), batch_size=st.integers(1, 60))
def test_a_batch_is_shared_out_whole_or_refused(micro_batch_size: int, replicas: int, batch_size: int) -> None:
    if batch_size % (micro_batch_size * replicas):
        with pytest.raises(InvalidConfigError, match=f"batch size {batch_size} cannot be shared out"):
            micro_steps(batch_size, micro_batch_size, replicas)
    else:
        assert micro_steps(batch_size, micro_batch_size, replicas) * micro_batch_size * replicas == batch_size


def test_micro_batches_change_the_speed_alone(tmp_path: Path) -> None:
    losses = [run(small_model(), tmp_path / str(size), samples(8), micro_batch_size=size).losses for size in (1, 2, 4)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_sharding_launcher_on_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would go on with the whole model in every process.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidConfigError, match="does not shard on this device"):
        run(small_model(), tmp_path, samples(8))


def test_mixed_precision_ends_with_the_training(tmp_path: Path) -> None:
    model = small_model()
    run(model, tmp_path, samples(8), mixed_precision=True)
    same = small_model()
    same.load_state_dict(model.state_dict())
    rows = torch.tensor([sample.input_ids for sample in samples(2).samples])
    assert torch.equal(model(rows).logits, same.eval()(rows).logits)


def test_the_machine_is_asked_for_bfloat16_and_memory() -> None:
    assert isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
    assert not has_fast_bfloat16(torch.device("meta"))
    # This process holds torch: more than 50 MiB, less than all memory.
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64


def test_the_device_is_the_one_that_is_named_else_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(device: torch.device, *args: Any) -> None:
        seen.append(device)
        raise InvalidConfigError("far enough")

    monkeypatch.setattr(training, "_arguments", stop)
    for options in ({}, {"device": torch.device("cuda:0")}):
        with pytest.raises(InvalidConfigError, match="far enough"):
            train(
                small_model(),
                samples(4),
                RECIPE,
                TrainSettings(),
                folder=tmp_path,
                collator=SampleCollator(2),
                **options,
            )
    assert seen == [torch.device("cpu"), torch.device("cuda:0")]


def test_a_gpu_is_used_though_the_model_is_elsewhere(tmp_path: Path) -> None:
    for name, on_cpu in (("cpu", True), ("cuda:0", False)):
        assert training._arguments(torch.device(name), RECIPE, TrainSettings(), tmp_path).use_cpu is on_cpu
