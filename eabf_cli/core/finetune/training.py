"""Training a model on samples with transformers' Trainer, on one device or many, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from eabf_cli.core.allocator import give_back_freed_memory
from eabf_cli.core.data.sample_set import SampleSet
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.errors import InvalidConfigError, TrainingInterrupted
from eabf_cli.core.finetune.chunked_loss import chunked_loss
from eabf_cli.core.finetune.fused_kernels import fused_kernels
from eabf_cli.core.finetune.interrupts import StopWithCheckpoint, stop_requests
from eabf_cli.core.finetune.manifest import Elapsed, elapsed_at, step_of, write_manifest
from eabf_cli.core.finetune.progress import DivergedError, Progress
from eabf_cli.core.finetune.recipe import OPTIMIZERS, Recipe
from eabf_cli.core.finetune.restoration import Restoration
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.sharding import NOT_SHARDED, gathered_weights
from eabf_cli.core.processes import is_sharded, num_replicas

NUM_KEPT_CHECKPOINTS = 3
# Below both, recomputing layers costs more time than the memory it frees is worth.
_CHECKPOINT_FROM_TOKENS = 4096
_CHECKPOINT_FROM_PARAMETERS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training did.

    Attributes:
        losses: one a step, in nats per token, those before a resumption among them.
        wall_s, tokens_per_s: over all attempts at the run (`Elapsed`).
        gathered_weights: a sharded model's whole weights, in the main process; else None.
    """

    losses: list[float]
    num_steps: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    gathered_weights: dict[str, Tensor] | None = None


def train(
    model: PreTrainedModel,
    samples: SampleSet,
    recipe: Recipe,
    settings: TrainSettings,
    *,
    folder: Path,
    collator: SampleCollator,
    device: torch.device | None = None,
    restoration: Restoration | None = None,
    resume_from: Path | None = None,
    run_started: float | None = None,
) -> TrainResult:
    """Finetune a model in place: the weights that require a gradient, loss where the labels have it.

    In several processes (torchrun, accelerate launch) each gets its share of every batch.

    Args:
        folder: where `checkpoint-N/` and `metrics.jsonl` go.
        device: where to train; None for where the model is. A model that is to be sharded is elsewhere at first.
        restoration: a loss that is added to the samples' own.
        resume_from: a checkpoint of an earlier run with the same recipe, samples and settings.
        run_started: when the run began, on `time.perf_counter`'s clock; the seconds of earlier attempts lie before it.
            None stands for this call.

    Raises:
        DivergedError: the loss became infinite or not a number, or rose far above its beginning.
        TrainingInterrupted: SIGINT or SIGTERM; a checkpoint was written.
        InvalidConfigError: the batch cannot be shared out, or sharding was asked for where it is not done.
    """
    num_steps = recipe.num_steps(len(samples))
    device = device or next(model.parameters()).device
    arguments = _arguments(device, recipe, settings, folder)
    progress = Progress(
        folder,
        show=settings.show_progress,
        peak_memory_gib=lambda: peak_memory_gib(device),
        restoration_loss=restoration.take_mean if restoration is not None else None,
    )
    started = time.perf_counter() - elapsed_at(resume_from).train_s
    first_micro_batch = step_of(resume_from) * arguments.gradient_accumulation_steps if resume_from is not None else 0
    # Inside the chunked loss: both are part of the model's forward.
    restored = restoration.attached(first_micro_batch) if restoration is not None else contextlib.nullcontext()
    fused = fused_kernels(model) if settings.fused_kernels else contextlib.nullcontext()
    with _as_it_was(model), fused, chunked_loss(model, settings.chunk_tokens), restored, stop_requests() as request:
        stopper = StopWithCheckpoint(request, saves=settings.save_steps is not None)
        callbacks = [progress, stopper, _Manifest(started, started if run_started is None else run_started)]
        if samples.num_lengths > 1:
            callbacks.append(_FreedMemory())
        trainer = SampleTrainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            samples_per_epoch=num_steps // recipe.epochs * recipe.batch_size,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        _check_sharding(trainer)
        try:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
        finally:
            progress.close()
            # While it is set, transformers divides every model that is made, with all processes taking part.
            unset_hf_deepspeed_config()
    if stopper.stopped_at is not None:
        kept = "with a checkpoint" if settings.save_steps is not None else "without a checkpoint"
        raise TrainingInterrupted(f"stopped after step {stopper.stopped_at} of {num_steps}, {kept}")
    wall_s = time.perf_counter() - started
    model.eval()
    num_tokens = int(trainer.state.num_input_tokens_seen)
    return TrainResult(
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        num_steps=num_steps,
        num_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=num_tokens / wall_s,
        gathered_weights=gathered_weights(trainer) if is_sharded() else None,
    )


def checkpoints_activations(num_parameters: int, longest: int) -> bool:
    """Whether layers are recomputed in the backward pass unless told otherwise: large models and long rows."""
    return longest > _CHECKPOINT_FROM_TOKENS or num_parameters > _CHECKPOINT_FROM_PARAMETERS


class SampleTrainer(Trainer):
    """A Trainer whose epochs are whole batches, and that names the sample in which a loss is lost."""

    def __init__(self, *args: Any, samples_per_epoch: int, **kwargs: Any) -> None:
        self._samples_per_epoch = samples_per_epoch
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # The rest of the samples waits for the next epoch's shuffle.
        return RandomSampler(train_dataset or self.train_dataset, num_samples=self._samples_per_epoch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        indices = inputs.pop("sample_index", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if indices is not None and not torch.isfinite(loss if isinstance(loss, Tensor) else loss[0]):
            raise DivergedError(_lost(self.train_dataset, indices.flatten().tolist(), self.state))
        return loss


def _lost(samples: Any, indices: list[int], state: TrainerState) -> str:
    origins = ", ".join(samples.origin(index) for index in indices)
    return (
        f"the loss is no number at step {state.global_step + 1} of {state.max_steps}, on {origins}: look at that "
        "sample, try a lower --learning-rate, or --dtype float32"
    )


class _FreedMemory(TrainerCallback):
    """Keeps the heap from growing with every row of another length.

    Rows of one length fit into each other's holes, and need not pay for pages that are cleared anew.
    """

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        give_back_freed_memory()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        give_back_freed_memory()


class _Manifest(TrainerCallback):
    """Marks each checkpoint that was written to its end, with the time since training and the run began."""

    def __init__(self, train_started: float, run_started: float) -> None:
        self.train_started = train_started
        self.run_started = run_started

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process writes a file of its own.
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            now = time.perf_counter()
            write_manifest(
                Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
                Elapsed(train_s=now - self.train_started, wall_s=now - self.run_started),
            )


def _arguments(device: torch.device, recipe: Recipe, settings: TrainSettings, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=micro_steps(recipe.batch_size, settings.micro_batch_size, num_replicas()),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        optim=OPTIMIZERS[recipe.optimizer],
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        bf16=settings.mixed_precision,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 1,
        save_total_limit=NUM_KEPT_CHECKPOINTS,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to=list(settings.report_to) or "none",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    # One process has one device; more GPUs in sight would be put under torch's DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def micro_steps(batch_size: int, micro_batch_size: int, replicas: int) -> int:
    """Forward passes of one process in an optimizer step.

    Raises:
        InvalidConfigError: the batch cannot be shared out evenly.
    """
    together = micro_batch_size * replicas
    if batch_size % together:
        raise InvalidConfigError(
            f"batch size {batch_size} cannot be shared out to {replicas} processes in micro-batches of "
            f"{micro_batch_size}: give a multiple of {together}"
        )
    return batch_size // together


def _check_sharding(trainer: Trainer) -> None:
    """transformers trains data-parallel, without a word, where it cannot shard."""
    if is_sharded() and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise InvalidConfigError(NOT_SHARDED)


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Take off what the Trainer leaves on a model.

    It switches the cache off in the config, and under mixed precision its `forward` runs in autocast for good:
    a model measured with that on is not the one that is saved.
    """
    use_cache = model.config.use_cache
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
