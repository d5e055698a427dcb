"""What a finetune run will do, worked out before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import load_tokenizer, read_config
from eabf_cli.core.checkpoint_format import check_can_save
from eabf_cli.core.data.packing import pack_samples
from eabf_cli.core.data.sample_set import SampleSet
from eabf_cli.core.data.samples import NUM_SAMPLES, DataConfig, SampleCollator, TooLong, TooShort, load_samples
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.device_memory import InsufficientMemoryError, available_memory
from eabf_cli.core.devices import choose_device, has_fast_bfloat16
from eabf_cli.core.errors import EabfError, InvalidConfigError
from eabf_cli.core.evaluation import EvalConfig
from eabf_cli.core.finetune.control import cut_samples
from eabf_cli.core.finetune.fused_kernels import check_fused_kernels, pays_fused_kernels
from eabf_cli.core.finetune.memory import MemoryEstimate, estimate_memory
from eabf_cli.core.finetune.memory_plan import MemorySettings, choose_tuning, fits, plan_to_dict
from eabf_cli.core.finetune.pose import PoseCollator, pose_samples
from eabf_cli.core.finetune.recipe import Recipe, recipe_for
from eabf_cli.core.finetune.settings import TUNING_NAMES, TUNINGS, LoraSettings, RestorationConfig, TrainSettings
from eabf_cli.core.finetune.sharding import check_context_parallelism, check_launched_precision
from eabf_cli.core.finetune.training import NUM_KEPT_CHECKPOINTS, checkpoints_activations, micro_steps
from eabf_cli.core.finetune.tuning import check_tuning
from eabf_cli.core.option_names import check_at_least_one
from eabf_cli.core.patch_checkpoint import MethodRequest, default_output, resolve_request
from eabf_cli.core.processes import is_main_process, is_sharded, num_processes, num_replicas
from eabf_cli.core.report import PatchReport, plan_patch
from eabf_cli.core.resolution import Resolution
from eabf_cli.core.sources import ModelSource, find_model

logger = logging.getLogger(__name__)

# Checkpoints on the way, unless told otherwise.
_NUM_SAVES = 5


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Arguments of `eabf finetune`.

    Attributes:
        request: the method and its numbers.
        samples: how many samples to train on.
        too_long: what happens to a sample longer than the target window (`DataConfig.too_long`).
        too_short: what happens to one that the original window holds (`DataConfig.too_short`).
        pack: several short samples in one row of the target window.
        pose: rows of the original window whose positions reach over the target window (arXiv 2309.10400).
        cut_to_window: the samples cut into pieces of the original window, for a control of other runs.
        preset: which recipe the values that are None are taken from (`recipe_for`).
        batch_size: samples of one optimizer step, over all devices and micro-batches.
        micro_batch_size: samples of one forward pass on one device.
        tuning: "full", "lora", "qlora", or "auto": the strongest of them that fits.
        lora: what lora and qlora train.
        merge: write the merged checkpoint after lora and qlora, not the adapter alone.
        restoration: keep the original model's predictions on short slices; None does not.
        activation_checkpointing: recompute layers in the backward pass; None decides by length and size.
        fused_kernels: norms and MLPs by Liger's kernels; None: where they pay (`pays_fused_kernels`).
        save_steps: a checkpoint every so many steps; None writes five in a run.
        dtype: "auto" trains float32 weights, under bfloat16 autocast where the hardware has it.
        evaluation: what is measured before and after; None measures nothing.
        control: also train on the same tokens cut to the original window, without a method.
        probe: with a dry run, make two real steps and measure their memory and time.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    request: MethodRequest = field(default_factory=MethodRequest)
    dataset: str | Path | tuple[str, ...] = DEMO_DATASET
    dataset_split: str | None = None
    samples: int = NUM_SAMPLES
    too_long: TooLong = DataConfig.too_long
    too_short: TooShort = DataConfig.too_short
    pack: bool = False
    pose: bool = False
    cut_to_window: bool = False
    preset: str = "auto"
    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    micro_batch_size: int = TrainSettings.micro_batch_size
    optimizer: str | None = None
    tuning: str = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)
    merge: bool = True
    restoration: RestorationConfig | None = None
    activation_checkpointing: bool | None = None
    fused_kernels: bool | None = None
    save_steps: int | None = None
    report_to: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 42
    evaluation: EvalConfig | None = field(default_factory=EvalConfig.quick)
    control: bool = False
    output: Path | None = None
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    probe: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        check_at_least_one(self, "samples", "micro_batch_size", "save_steps")
        if self.tuning not in TUNING_NAMES:
            raise InvalidConfigError(f"unknown tuning {self.tuning!r}; known: {', '.join(TUNING_NAMES)}")
        if self.pose and self.pack:
            raise InvalidConfigError("rows are either packed or have skipped positions: leave out --pack or --pose")
        if self.cut_to_window and (self.pose or self.pack):
            raise InvalidConfigError("samples that are cut to the window are rows as they are: leave out pack and pose")
        if self.probe and not self.dry_run:
            raise InvalidConfigError("--probe measures what a run would take: give --dry-run with it")

    @property
    def dataset_names(self) -> str | list[str]:
        """The dataset's name, or the names of several."""
        return list(map(str, self.dataset)) if isinstance(self.dataset, tuple) else str(self.dataset)


@dataclass(frozen=True, kw_only=True)
class FinetuneTarget:
    """The model that a run extends, and its folder.

    Attributes:
        resolution: the method that the run trains under.
        stored: the method of ours that the model's checkpoint carries, which `--rebase` takes off.
    """

    source: ModelSource
    resolution: Resolution
    stored: Resolution | None
    report: PatchReport
    num_parameters: int
    folder: Path

    @property
    def window(self) -> int:
        """The pre-trained window, in tokens."""
        window = self.resolution.scaling.original_max_position_embeddings
        assert window is not None
        return window

    @property
    def target_window(self) -> int:
        """The extended window, in tokens."""
        return self.resolution.scaling.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(FinetuneTarget):
    """What a run will do, known before any weight is loaded.

    Attributes:
        dataset: its name, or the names of several.
        device: where the run takes place.
        samples: what was drawn.
        rows: what is trained on: the samples, packed, cut or with skipped positions where that was asked for.
        recipe: as the user knows it, in samples.
        row_recipe: the same in rows.
        memory: the estimate of each tuning.
        available_bytes: what the device has for it.
    """

    dataset: str | list[str]
    device: str
    tokenizer: Any
    samples: SampleSet
    rows: SampleSet
    collator: SampleCollator
    recipe: Recipe
    row_recipe: Recipe
    settings: TrainSettings
    tuning: str
    tuning_reason: str
    memory: Mapping[str, MemoryEstimate]
    available_bytes: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.row_recipe.num_steps(len(self.rows))

    @property
    def num_tokens(self) -> int:
        """Tokens that the run goes through."""
        per_row = self.rows.num_tokens / len(self.rows)
        return round(self.num_steps * self.row_recipe.batch_size * per_row)

    @property
    def memory_settings(self) -> MemorySettings:
        """What a message about too little memory speaks of."""
        return MemorySettings(
            tuning=self.tuning,
            checkpointing=self.settings.activation_checkpointing,
            micro_batch=self.settings.micro_batch_size,
            seq_len=self.rows.longest_row,
            uses_pose=isinstance(self.collator, PoseCollator),
        )

    @property
    def disk_bytes(self) -> int:
        """What the run's checkpoints and the final one need together."""
        # A checkpoint holds what is trained and AdamW's two moments of it, in float32 (of adapters, the moments tell
        # how much that is); one more than are kept lies there while the newest is written.
        whole = 12 * self.num_parameters
        checkpoint = whole if self.tuning == "full" else 3 * self.memory[self.tuning].optimizer // 2
        checkpoints = (NUM_KEPT_CHECKPOINTS + 1) * checkpoint
        return checkpoints + 4 * self.num_parameters


def find_target(config: FinetuneConfig) -> FinetuneTarget:
    """Find the model and work out its extension and the run's folder.

    Raises:
        EabfError: the model, the method or their combination is refused.
    """
    source = find_model(config.model, revision=config.revision, with_weights=not config.dry_run or config.probe)
    if source.base is not None:
        raise InvalidConfigError(
            f"{source.name} is an adapter: merge it first, or finetune its base {source.base.name}"
        )
    loaded = read_config(source)
    resolution = resolve_request(config.request, loaded)
    if config.tuning != "auto":
        check_tuning(config.tuning, source, resolution.base_config, device=config.device)
    skeleton = architectures.meta_model(resolution.base_config)
    report = plan_patch(skeleton, resolution)
    if config.merge or config.tuning in ("auto", "full"):
        check_can_save(resolution.base_config, resolution.scaling)
    return FinetuneTarget(
        source=source,
        resolution=resolution,
        stored=loaded.resolution,
        report=report,
        num_parameters=skeleton.num_parameters(),
        folder=config.output or default_output(source.name, resolution.scaling),
    )


def make_plan(config: FinetuneConfig, target: FinetuneTarget) -> FinetunePlan:
    """Draw the samples, choose what is tuned and the recipe.

    Raises:
        EabfError: the data or the recipe makes no sense.
    """
    _check_installed(config)
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    samples = _draw_samples(config, target, tokenizer)
    rows = _make_rows(config, target, tokenizer, samples)
    device = choose_device(config.device)
    settings = _train_settings(config, target, rows, device)
    recipes = {tuning: _recipe(config, target, len(samples), tuning) for tuning in TUNINGS}
    memory = {
        tuning: estimate_memory(
            target.resolution.base_config,
            tuning=tuning,
            seq_len=rows.longest_row,
            micro_batch=settings.micro_batch_size,
            device_type=device.type,
            mixed_precision=settings.mixed_precision,
            checkpointing=settings.activation_checkpointing,
            optimizer=recipe.optimizer,
            accumulates=recipe.batch_size > settings.micro_batch_size * num_replicas(),
            lora=config.lora,
            restored_tokens=_restored_tokens(config, target),
            teacher_dtype=_teacher_dtype(config, target, mixed_precision=settings.mixed_precision),
            num_lengths=rows.num_lengths,
            num_processes=num_processes(),
            shard="shard" if is_sharded() else "replicate",
        )
        for tuning, recipe in recipes.items()
    }
    available = available_memory(device)
    tuning, reason = _choose_tuning(config, target, memory, available)
    if config.tuning == "auto" and tuning == "full" and (config.lora != LoraSettings() or not config.merge):
        logger.warning("full tuning was chosen (%s): what was set for adapters has no effect", reason)
    row_recipe = _in_rows(config, recipes[tuning], samples, rows)
    return FinetunePlan(
        **vars(target),
        dataset=config.dataset_names,
        device=str(device),
        tokenizer=tokenizer,
        samples=samples,
        rows=rows,
        collator=(PoseCollator if config.pose else SampleCollator).from_tokenizer(tokenizer),
        recipe=recipes[tuning],
        row_recipe=row_recipe,
        settings=replace(
            settings, save_steps=config.save_steps or max(1, row_recipe.num_steps(len(rows)) // _NUM_SAVES)
        ),
        tuning=tuning,
        tuning_reason=reason,
        memory=memory,
        available_bytes=available,
    )


def _check_installed(config: FinetuneConfig) -> None:
    """Refuse what an absent package would do.

    Raises:
        EabfError: an optimizer in 8 bits without bitsandbytes, or metrics for something that is not installed.
    """
    if (config.optimizer or Recipe.optimizer) != Recipe.optimizer and find_spec("bitsandbytes") is None:
        raise EabfError(
            f"bitsandbytes is not installed, and --optimizer {config.optimizer} needs it: pip install 'eabf-cli[gpu]'"
        )
    known = get_available_reporting_integrations()
    missing = [name for name in config.report_to if name not in known]
    if missing:
        raise InvalidConfigError(
            f"--report-to {missing[0]!r} is not installed or not known to transformers; "
            f"there are: {', '.join(known) or 'none'}"
        )
    if "wandb" in config.report_to and not config.dry_run and is_main_process():
        _log_in_to_wandb()


def _log_in_to_wandb() -> None:
    """Ask for the key before a run has begun, not when training does; nothing to do where wandb is set to be offline.

    Raises:
        EabfError: there is none.
    """
    import wandb

    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise EabfError(
            f"--report-to wandb cannot begin: {error}\nWANDB_API_KEY is read as well, and WANDB_MODE=offline needs none"
        ) from error


def _train_settings(
    config: FinetuneConfig, target: FinetuneTarget, rows: SampleSet, device: torch.device
) -> TrainSettings:
    checkpointing = config.activation_checkpointing
    if checkpointing is None:
        checkpointing = checkpoints_activations(target.num_parameters, rows.longest_row)
    mixed_precision = config.dtype != "float32" and has_fast_bfloat16(device)
    check_launched_precision(mixed_precision=mixed_precision)
    check_context_parallelism(
        mixed_precision=mixed_precision, packs=config.pack, restores=config.restoration is not None
    )
    fused = config.fused_kernels
    if fused:
        check_fused_kernels(target.resolution.base_config, device.type)
    elif fused is None:
        fused = pays_fused_kernels(target.resolution.base_config, device.type, longest=rows.longest_row)
    return TrainSettings(
        seed=config.seed,
        mixed_precision=mixed_precision,
        micro_batch_size=config.micro_batch_size,
        activation_checkpointing=checkpointing,
        fused_kernels=fused,
        report_to=config.report_to,
        show_progress=config.show_progress,
    )


def _restored_tokens(config: FinetuneConfig, target: FinetuneTarget) -> int:
    """Tokens of a slice under the restoration loss; 0 without one."""
    return 0 if config.restoration is None else min(config.restoration.length or target.window, target.window)


def _teacher_dtype(config: FinetuneConfig, target: FinetuneTarget, *, mixed_precision: bool) -> torch.dtype:
    """What a copy of the original model is held in; a folder without weights may not tell, and the widest counts."""
    stored = target.resolution.base_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return stored if mixed_precision and isinstance(stored, torch.dtype) else torch.float32


def _recipe(config: FinetuneConfig, target: FinetuneTarget, num_samples: int, tuning: str) -> Recipe:
    recipe = recipe_for(
        target.num_parameters,
        num_samples,
        preset=config.preset,
        lora=tuning != "full",
        multiple_of=config.micro_batch_size * num_replicas(),
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
    )
    micro_steps(recipe.batch_size, config.micro_batch_size, num_replicas())
    return recipe


def _draw_samples(config: FinetuneConfig, target: FinetuneTarget, tokenizer: Any) -> SampleSet:
    return load_samples(
        DataConfig(
            dataset=config.dataset,
            dataset_split=config.dataset_split,
            num_samples=config.samples,
            max_length=target.target_window,
            too_long=config.too_long,
            # Only whole samples in rows of their own teach by their length.
            min_length=None if config.pack or config.pose else min(target.window + 1, target.target_window),
            too_short=config.too_short,
            seed=config.seed,
        ),
        tokenizer,
    )


def _make_rows(config: FinetuneConfig, target: FinetuneTarget, tokenizer: Any, samples: SampleSet) -> SampleSet:
    length = target.target_window
    if config.cut_to_window:
        return cut_samples(samples, target.window, tokenizer.bos_token_id)
    if config.pack:
        return pack_samples(samples, length)
    if config.pose:
        return pose_samples(
            samples,
            window=target.window,
            target=length,
            bos_token_id=tokenizer.bos_token_id,
            seed=config.seed,
            epochs=_recipe(config, target, len(samples), "full").epochs,
        )
    return samples


def _in_rows(config: FinetuneConfig, recipe: Recipe, samples: SampleSet, rows: SampleSet) -> Recipe:
    """The recipe with as many rows a step as hold the tokens of its samples, and one pass over rows of all epochs."""
    share = config.micro_batch_size * num_replicas()
    epochs = recipe.epochs if config.pose else 1
    batch_size = share * max(1, round(recipe.batch_size * len(rows) / (epochs * len(samples)) / share))
    return replace(recipe, batch_size=batch_size, epochs=recipe.epochs // epochs)


def _choose_tuning(
    config: FinetuneConfig, target: FinetuneTarget, memory: Mapping[str, MemoryEstimate], available: int
) -> tuple[str, str]:
    """What is tuned, and why; only a dry run goes on with what does not fit."""
    if config.tuning != "auto":
        reason = "as the run was started" if config.resume else "as asked for"
        return config.tuning, reason if fits(memory[config.tuning], available) else f"{reason}; it may not fit"
    can_quantize = _can_quantize(config, target)
    try:
        choice = choose_tuning(memory, available, can_quantize=can_quantize)
    except InsufficientMemoryError as error:
        if not config.dry_run:
            raise
        return "qlora" if can_quantize else "lora", str(error)
    return choice.tuning, choice.reason


def _can_quantize(config: FinetuneConfig, target: FinetuneTarget) -> bool:
    try:
        check_tuning("qlora", target.source, target.resolution.base_config, device=config.device)
    except EabfError:
        return False
    return True


def planned_result(plan: FinetunePlan) -> dict[str, Any]:
    """The keys of a result that are known before the run, which are also what `--dry-run` shows."""
    return plan.report.to_dict() | {
        "model": plan.source.name,
        "dataset": plan.dataset,
        **plan.samples.summary(),
        "num_rows": len(plan.rows),
        "num_steps": plan.num_steps,
        "num_tokens": plan.num_tokens,
        "recipe": asdict(plan.recipe),
        "num_parameters": plan.num_parameters,
        "tuning": plan.tuning,
        "tuning_reason": plan.tuning_reason,
        "settings": asdict(plan.settings),
        "memory": plan_to_dict(plan.memory, plan.available_bytes, device=plan.device),
        "seed": plan.settings.seed,
        "output": str(plan.folder),
    }
