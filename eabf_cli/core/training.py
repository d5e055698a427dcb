"""Training a model on samples with transformers' Trainer."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from eabf_cli.core.data import SampleCollator, SampleSet
from eabf_cli.core.errors import EabfError
from eabf_cli.core.recipe import Recipe

METRICS_FILE = "metrics.jsonl"
_TRAINER_STATE = "trainer_state.json"
NUM_KEPT_CHECKPOINTS = 3


class DivergedError(EabfError):
    """The loss became infinite or not a number."""


class _SampleTrainer(Trainer):
    """A Trainer whose epochs are whole batches: the rest of the samples waits for the next shuffle."""

    def __init__(self, *args: Any, samples_per_epoch: int, **kwargs: Any) -> None:
        self._samples_per_epoch = samples_per_epoch
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return RandomSampler(train_dataset or self.train_dataset, num_samples=self._samples_per_epoch)


class _Progress(TrainerCallback):
    """One live line, a line a step in `metrics.jsonl`, and a stop when the loss is lost."""

    def __init__(self, folder: Path, tokens_per_step: float, *, show: bool) -> None:
        self.folder = folder
        self.tokens_per_step = tokens_per_step
        self.show = show
        self.bar: Any = None
        self.last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _keep_lines_up_to(state.global_step, self.folder / METRICS_FILE)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="Finetuning", unit="step", disable=not self.show
        )
        self.last = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        now = time.perf_counter()
        rate = self.tokens_per_step / (now - self.last)
        self.last = now
        loss = logs["loss"]
        line = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_s": round(rate, 1),
        }
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.update(state.global_step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
        if not torch.isfinite(torch.tensor(loss)):
            raise DivergedError(
                f"the loss became {loss} at step {state.global_step} of {state.max_steps}: "
                "try a lower --learning-rate, or --dtype float32"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def train(
    model: PreTrainedModel,
    samples: SampleSet,
    recipe: Recipe,
    *,
    folder: Path,
    collator: SampleCollator,
    seed: int,
    mixed_precision: bool,
    resume_from: Path | None = None,
    keep_checkpoints: bool = True,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Finetune a model in place, all weights, loss where the labels have it.

    Args:
        folder: where `checkpoint-N/` and `metrics.jsonl` go.
        mixed_precision: bfloat16 autocast over float32 weights.
        resume_from: a checkpoint of an earlier run with the same settings.
        keep_checkpoints: write `checkpoint-N/` a few times on the way (the newest three are kept).

    Returns:
        `train_loss` (a list, one entry a step), `num_steps`, `num_tokens`, `wall_s`, `tokens_per_s`.

    Raises:
        DivergedError: the loss became infinite or not a number.
    """
    num_steps = recipe.num_steps(len(samples))
    device = next(model.parameters()).device
    tokens_per_step = recipe.batch_size * samples.num_tokens / len(samples)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        bf16=mixed_precision,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if keep_checkpoints else "no",
        save_steps=max(1, num_steps // 5),
        save_total_limit=NUM_KEPT_CHECKPOINTS,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        # Long rows: recomputing layers costs a third more time and keeps a row's memory to one layer's.
        activation_checkpointing=model.num_parameters() > 50e6,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    # The Trainer switches the cache off in the config, for good.
    use_cache = model.config.use_cache
    trainer = _SampleTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collator,
        samples_per_epoch=num_steps // recipe.epochs * recipe.batch_size,
        callbacks=[_Progress(folder, tokens_per_step, show=show_progress)],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
    finally:
        model.config.use_cache = use_cache
    wall_s = time.perf_counter() - started
    model.eval()
    first_step = _step_of(resume_from) if resume_from is not None else 0
    num_trained = round((num_steps - first_step) * tokens_per_step)
    return {
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "num_steps": num_steps,
        "num_tokens": round(num_steps * tokens_per_step),
        "wall_s": wall_s,
        "tokens_per_s": num_trained / wall_s,
    }


def _keep_lines_up_to(step: int, metrics: Path) -> None:
    """Drop what a run wrote after the checkpoint that it goes on from (0: all), half a line of a killed one too."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    metrics.write_text("".join(kept), encoding="utf-8")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, or None."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / _TRAINER_STATE).is_file()]
    return max(found, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are done in hardware there; elsewhere they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        with contextlib.suppress(AttributeError):
            capabilities = torch.cpu.get_capabilities()
            return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: on the GPU if it ran there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak / 2**20 if os.uname().sysname == "Linux" else peak / 2**30
