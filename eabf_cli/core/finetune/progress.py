"""What is seen of a training while it goes on: one live line, a line a step on disk, and a stop when it is lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eabf_cli.core.errors import EabfError
from eabf_cli.core.finetune.metrics import append_metrics, drop_metrics_after

# A loss this far above the first steps' (in nats), for as many steps as the mean is taken over, does not come back.
_DIVERGED_BY = 1.0
_MEAN_STEPS = 3
_ADVICE = "try a lower --learning-rate, or --dtype float32"


class DivergedError(EabfError):
    """The loss became infinite or not a number, or rose far above where it began."""


class Progress(TrainerCallback):
    """Reports each step: loss, tokens/s, memory and time left; raises `DivergedError` when the loss is lost."""

    def __init__(
        self,
        folder: Path,
        *,
        show: bool,
        peak_memory_gib: Callable[[], float],
        restoration_loss: Callable[[], float | None] | None = None,
    ) -> None:
        self.folder = folder
        self.show = show
        self.peak_memory_gib = peak_memory_gib
        self.restoration_loss = restoration_loss
        self.losses: list[float] = []
        self.bar: Any = None
        self.since = 0.0
        self.num_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.num_tokens = int(state.num_input_tokens_seen)
        self.since = time.perf_counter()
        is_main = state.is_world_process_zero
        if is_main:
            drop_metrics_after(self.folder, state.global_step)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Finetuning",
            unit="step",
            disable=not (self.show and is_main),
        )

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
        now, num_tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        seconds, rate = now - self.since, (num_tokens - self.num_tokens) / (now - self.since)
        self.since, self.num_tokens = now, num_tokens
        loss = logs["loss"]
        self.losses.append(loss)
        if state.is_world_process_zero:
            line = {
                "step": state.global_step,
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_s": round(rate, 1),
                "num_tokens": num_tokens,
                "step_s": round(seconds, 3),
                "peak_memory_gib": round(self.peak_memory_gib(), 3),
            }
            if self.restoration_loss is not None:
                line["restoration_loss"] = self.restoration_loss()
            append_metrics(self.folder, line)
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s, {line['peak_memory_gib']:.1f} GiB")
        self._check(state)

    def _check(self, state: TrainerState) -> None:
        where = f"at step {state.global_step} of {state.max_steps}"
        if not math.isfinite(self.losses[-1]):
            raise DivergedError(f"the loss became {self.losses[-1]} {where}: {_ADVICE}")
        first, last = self.losses[:_MEAN_STEPS], self.losses[_MEAN_STEPS:][-_MEAN_STEPS:]
        if len(last) == _MEAN_STEPS and fmean(last) > fmean(first) + _DIVERGED_BY:
            raise DivergedError(
                f"the loss diverges: {fmean(last):.2f} {where}, {fmean(first):.2f} in the first "
                f"{_MEAN_STEPS} steps: {_ADVICE}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal's line as it is."""
        if self.bar is not None:
            self.bar.close()
