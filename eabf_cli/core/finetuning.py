"""The main job: extend a model, finetune it on a few long samples, prove it, write the checkpoint."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import choose_device, load_model, load_tokenizer, read_config, torch_dtype
from eabf_cli.core.checkpoint_format import check_can_save
from eabf_cli.core.control import cut_samples
from eabf_cli.core.data import DataConfig, SampleCollator, SampleSet, load_samples
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.errors import CheckpointError, InvalidConfigError, OutputExistsError
from eabf_cli.core.evals.table import format_table
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.files import check_space, check_target, disk_errors_explained, read_json, write_json
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patch_checkpoint import (
    MethodRequest,
    copy_tokenizer,
    default_output,
    resolve_request,
    save_tokenizer,
)
from eabf_cli.core.patching import apply_resolution, patch_report
from eabf_cli.core.recipe import Recipe, recipe_for
from eabf_cli.core.report import plan_patch
from eabf_cli.core.resolution import Resolution
from eabf_cli.core.run_record import RUN_FILE, read_run_record, run_record, write_run_record
from eabf_cli.core.sources import ModelSource, find_model
from eabf_cli.core.training import (
    NUM_KEPT_CHECKPOINTS,
    has_fast_bfloat16,
    newest_checkpoint,
    peak_memory_gib,
    train,
)

logger = logging.getLogger(__name__)

SETTINGS_FILE = "eabf_settings.json"
# Settings that a resumed run may change: they do not touch the weights.
_FREE_SETTINGS = ("overwrite", "resume", "output", "show_progress", "dry_run")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Arguments of `eabf finetune`.

    Attributes:
        request: the method and its numbers.
        samples: how many samples to train on.
        too_long: what happens to a sample longer than the target window (`DataConfig.too_long`).
        learning_rate, epochs, batch_size: None takes the recipe's value for the model's size.
        dtype: "auto" trains float32 weights, under bfloat16 autocast where the hardware has it.
        evaluation: what is measured before and after; None measures nothing.
        control: also train on the same tokens cut to the original window, without a method.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    request: MethodRequest = field(default_factory=MethodRequest)
    dataset: str | Path | tuple[str, ...] = DEMO_DATASET
    dataset_split: str | None = None
    samples: int = 100
    too_long: str = "error"
    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
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
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The model that a run extends, and its folder."""

    source: ModelSource
    resolution: Resolution
    num_parameters: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class _Plan(_Target):
    """What a run will do, known before any weight is loaded."""

    samples: SampleSet
    recipe: Recipe
    tokenizer: Any


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Extend a model's window and finetune it on a few long samples (arXiv 2401.07004, section 4.1).

    The run lives in its folder: settings first, `checkpoint-N/` while it trains, the final checkpoint in
    the form of DESIGN.md section 4, and `eabf_run.json` last.

    Returns:
        the JSON result of DESIGN.md section 5.

    Raises:
        EabfError: anything the user can put right, before weights are loaded where it can be known.
    """
    torch_dtype(config.dtype)
    choose_device(config.device)
    target = _target(config)
    finished = _finished_run(config, target.folder)
    if finished is not None:
        return finished
    plan = _plan(config, target)
    if config.dry_run:
        return _planned_result(config, plan)
    if plan.source.gguf_file is None:
        plan.source.weight_files()
    # A checkpoint on the way holds float32 weights and the optimizer's two moments.
    check_space(plan.folder, 12 * plan.num_parameters * (NUM_KEPT_CHECKPOINTS + 1))
    resume_from = _open_folder(config, plan)
    with disk_errors_explained(plan.folder):
        return _run(config, plan, resume_from)


def _run(config: FinetuneConfig, plan: _Plan, resume_from: Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    set_seed(config.seed)
    model = load_model(config.model, revision=config.revision, dtype="float32", device=config.device)
    stored_dtype = _stored_dtype(plan.source, config)
    device = next(model.parameters()).device
    mixed = config.dtype != "float32" and has_fast_bfloat16(device)
    logger.info(
        "%s: %s parameters on %s, %s; %s", plan.source.name, f"{plan.num_parameters:,}", device,
        "bfloat16 autocast over float32 weights" if mixed else "float32", _recipe_text(plan),
    )  # fmt: skip

    trainer = _Job(config, plan, mixed)
    results: dict[str, Any] = {}
    if config.control:
        results["control"] = trainer.run_control(copy.deepcopy(model))
    results["original"] = trainer.evaluate(model, "original")
    apply_resolution(model, plan.resolution)
    report = patch_report(model)
    assert report is not None
    results["before"] = trainer.evaluate(model, "patched")
    training = trainer.train(model, plan.samples, plan.recipe, plan.folder, resume_from=resume_from)
    # What is measured is what is saved.
    _round_weights(model, stored_dtype)
    results["after"] = trainer.evaluate(model, "finetuned")

    result = report.to_dict() | {
        "model": plan.source.name,
        "revision": plan.source.revision,
        "dataset": str(config.dataset),
        **plan.samples.summary(),
        **{name: training[name] for name in ("num_steps", "num_tokens", "train_loss", "tokens_per_s")},
        "recipe": asdict(plan.recipe),
        "tuning": "full",
        "seed": config.seed,
        "device": str(device),
        **{name: results.get(name) for name in ("original", "before", "after", "control")},
        "train_s": training["wall_s"],
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(device),
        "output": str(plan.folder),
    }
    _write_final(config, plan, model.to(stored_dtype), result)
    return result


@torch.no_grad()
def _round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give float32 weights the values that they have in another dtype.

    Casting the model would round its rotary frequencies, too, which a loaded checkpoint has in float32.
    """
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))


class _Job:
    """The steps that the extended model and the control share."""

    def __init__(self, config: FinetuneConfig, plan: _Plan, mixed_precision: bool) -> None:
        self.config = config
        self.plan = plan
        self.mixed_precision = mixed_precision
        self.collator = SampleCollator.from_tokenizer(plan.tokenizer)

    def evaluate(self, model: PreTrainedModel, name: str) -> dict[str, Any] | None:
        """Measure a model at the same lengths as the others, the target's among them."""
        if self.config.evaluation is None:
            return None
        scaling = self.plan.resolution.scaling
        evaluation = self.config.evaluation
        if evaluation.lengths is None:
            window = scaling.original_max_position_embeddings
            assert window is not None
            evaluation = evaluation.replace(lengths=tuple(_lengths(window, scaling.max_position_embeddings)))
        logger.info("Evaluating the %s model", name)
        return evaluate(model, self.plan.tokenizer, evaluation)

    def train(
        self,
        model: PreTrainedModel,
        samples: SampleSet,
        recipe: Recipe,
        folder: Path,
        *,
        resume_from: Path | None = None,
        keep_checkpoints: bool = True,
    ) -> dict[str, Any]:
        return train(
            model,
            samples,
            recipe,
            folder=folder,
            collator=self.collator,
            seed=self.config.seed,
            mixed_precision=self.mixed_precision,
            resume_from=resume_from,
            keep_checkpoints=keep_checkpoints,
            show_progress=self.config.show_progress,
        )

    def run_control(self, model: PreTrainedModel) -> dict[str, Any]:
        """The same tokens cut to the original window, the same number of steps, no method."""
        window = self.plan.resolution.scaling.original_max_position_embeddings
        assert window is not None
        pieces = cut_samples(self.plan.samples, window, self.plan.tokenizer.bos_token_id)
        recipe = Recipe(**{**asdict(self.plan.recipe), "batch_size": _control_batch(self.plan, pieces)})
        folder = self.plan.folder / "control"
        folder.mkdir(exist_ok=True)
        logger.info("Training the control: the same samples cut to %s tokens, no method", f"{window:,}")
        training = self.train(model, pieces, recipe, folder, keep_checkpoints=False)
        result = self.evaluate(model, "control") or {}
        return result | {name: training[name] for name in ("train_loss", "num_steps", "num_tokens")}


def _control_batch(plan: _Plan, pieces: SampleSet) -> int:
    """The batch that gives the control as many tokens a step as the extended model has."""
    return max(1, round(plan.recipe.batch_size * len(pieces) / len(plan.samples)))


def _lengths(window: int, target: int) -> list[int]:
    """The original window, its doublings up to the target, and twice the target."""
    lengths = [window]
    while lengths[-1] * 2 <= target:
        lengths.append(lengths[-1] * 2)
    return sorted({*lengths, target, 2 * target})


def _target(config: FinetuneConfig) -> _Target:
    source = find_model(config.model, revision=config.revision, with_weights=not config.dry_run)
    loaded = read_config(source)
    resolution = resolve_request(config.request, loaded)
    if config.request.rebase and resolution.notes:
        raise InvalidConfigError(
            f"{source.name} is scaled already, and finetune starts from an unscaled model: give -m the original model"
        )
    skeleton = architectures.meta_model(resolution.base_config)
    plan_patch(skeleton, resolution)
    check_can_save(resolution.base_config, resolution.scaling)
    return _Target(
        source=source,
        resolution=resolution,
        num_parameters=skeleton.num_parameters(),
        folder=config.output or default_output(source.name, resolution.scaling),
    )


def _plan(config: FinetuneConfig, target: _Target) -> _Plan:
    if not config.dry_run:
        _check_folder(config, target)
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    samples = load_samples(
        DataConfig(
            dataset=config.dataset,
            dataset_split=config.dataset_split,
            num_samples=config.samples,
            max_length=target.resolution.scaling.max_position_embeddings,
            too_long=config.too_long,  # type: ignore[arg-type]
            seed=config.seed,
        ),
        tokenizer,
    )
    recipe = recipe_for(
        target.num_parameters,
        len(samples),
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
    )
    return _Plan(**vars(target), samples=samples, recipe=recipe, tokenizer=tokenizer)


def _settings(config: FinetuneConfig, plan: _Plan) -> dict[str, Any]:
    """What decides the weights of a run, in JSON form."""
    given = {name: value for name, value in asdict(config).items() if name not in _FREE_SETTINGS}
    given["dataset"] = str(config.dataset)
    settings = given | {
        "recipe": asdict(plan.recipe),
        "scaling": plan.resolution.scaling.to_dict(),
        "data_hash": plan.samples.data_hash,
        "weights": plan.source.fingerprint(),
    }
    return _jsonable(settings)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _finished_run(config: FinetuneConfig, folder: Path) -> dict[str, Any] | None:
    """The result of a run that `--resume` finds finished."""
    if not config.resume:
        return None
    if not folder.is_dir():
        raise CheckpointError(f"run folder {folder} does not exist: leave --resume out to start a run there")
    record = read_run_record(folder)
    if record is not None and record.get("command") == "finetune":
        logger.warning("run %s is finished already: nothing to resume", folder)
        return record
    if not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(f"folder {folder} holds no finetune run ({SETTINGS_FILE} is missing)")
    return None


def _check_folder(config: FinetuneConfig, target: _Target) -> None:
    folder = target.folder
    if config.resume:
        return
    is_unfinished = (folder / SETTINGS_FILE).is_file() and not (folder / RUN_FILE).is_file()
    if is_unfinished and not config.overwrite:
        raise OutputExistsError(
            f"run folder {folder} is not finished: go on with --resume -o {folder}, or start anew with --overwrite"
        )
    datasets = [config.dataset] if isinstance(config.dataset, str | Path) else config.dataset
    local = [Path(name) for name in datasets if Path(name).exists()]
    check_target(folder, overwrite=config.overwrite, sources=(target.source.folder, *local))


def _open_folder(config: FinetuneConfig, plan: _Plan) -> Path | None:
    """Make or reopen the run's folder.

    Returns:
        the checkpoint to go on from, or None for a start.
    """
    settings = _settings(config, plan)
    if not config.resume:
        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir(parents=True)
        write_json(plan.folder / SETTINGS_FILE, settings)
        return None
    before = read_json(plan.folder / SETTINGS_FILE)
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        lines = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
        raise InvalidConfigError(
            f"run {plan.folder} was started with other settings: {lines}; give the same ones, "
            "or start anew in another folder"
        )
    checkpoint = newest_checkpoint(plan.folder)
    logger.info("Resuming %s from %s", plan.folder, checkpoint.name if checkpoint else "its beginning")
    return checkpoint


def _stored_dtype(source: ModelSource, config: FinetuneConfig) -> torch.dtype:
    """The dtype of the final checkpoint: the given one, else the source's own."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if source.gguf_file is not None:
        return torch.float32
    raw = source.config()
    return getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32")


def _write_final(config: FinetuneConfig, plan: _Plan, model: PreTrainedModel, result: dict[str, Any]) -> None:
    scaling = plan.resolution.scaling
    model.save_pretrained(plan.folder)
    if plan.source.gguf_file is None:
        copy_tokenizer(plan.source.folder, plan.folder, scaling.max_position_embeddings)
    else:
        save_tokenizer(plan.tokenizer, plan.folder, scaling.max_position_embeddings)
    report = patch_report(model)
    assert report is not None
    write_model_card(
        plan.folder,
        report,
        base_model=plan.source.name,
        revision=plan.source.revision,
        results=_results_text(result),
    )
    write_run_record(plan.folder, run_record("finetune", _settings(config, plan), result))
    for left in (*plan.folder.glob("checkpoint-*"), plan.folder / "control"):
        shutil.rmtree(left, ignore_errors=True)


def comparison_table(result: dict[str, Any]) -> str:
    """The before-and-after table of a finetune result; empty if nothing was measured."""
    names = {"original": "original", "before": "patched", "after": "finetuned", "control": "control"}
    measured = {shown: result[name] for name, shown in names.items() if result.get(name)}
    return format_table(measured) if measured else ""


def _results_text(result: dict[str, Any]) -> str:
    trained = (
        f"Finetuned on {result['num_samples']} samples of `{result['dataset']}` "
        f"({result['num_tokens']:,} tokens, {result['num_steps']} steps)."
    )
    table = comparison_table(result)
    return f"{trained}\n\n```\n{table}\n```" if table else f"{trained} No evaluation was run."


def _recipe_text(plan: _Plan) -> str:
    recipe, samples = plan.recipe, plan.samples
    return (
        f"{len(samples)} samples, {samples.num_tokens:,} tokens, {recipe.num_steps(len(samples))} steps of "
        f"{recipe.batch_size}, learning rate {recipe.learning_rate:g}"
    )


def _planned_result(config: FinetuneConfig, plan: _Plan) -> dict[str, Any]:
    report = plan_patch(architectures.meta_model(plan.resolution.base_config), plan.resolution)
    num_steps = plan.recipe.num_steps(len(plan.samples))
    return report.to_dict() | {
        "model": plan.source.name,
        "dataset": str(config.dataset),
        **plan.samples.summary(),
        "num_steps": num_steps,
        "num_tokens": round(num_steps * plan.recipe.batch_size * plan.samples.num_tokens / len(plan.samples)),
        "recipe": asdict(plan.recipe),
        "num_parameters": plan.num_parameters,
        "tuning": "full",
        "output": str(plan.folder),
    }
