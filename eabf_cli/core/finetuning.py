"""The main job: extend a model, finetune it on a few long samples, prove it, write the checkpoint."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.control import cut_samples
from eabf_cli.core.data import SampleCollator, SampleSet
from eabf_cli.core.devices import choose_device, torch_dtype
from eabf_cli.core.evals.table import format_table
from eabf_cli.core.evaluation import evaluate
from eabf_cli.core.files import check_space, disk_errors_explained
from eabf_cli.core.finetune_plan import FinetuneConfig, FinetunePlan, find_target, make_plan, planned_result
from eabf_cli.core.frequencies import doublings
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patch_checkpoint import copy_tokenizer, save_tokenizer
from eabf_cli.core.patching import apply_resolution
from eabf_cli.core.recipe import Recipe
from eabf_cli.core.run_folder import check_folder, finished_run, open_folder, run_settings
from eabf_cli.core.run_record import run_record, write_run_record
from eabf_cli.core.sources import ModelSource
from eabf_cli.core.training import NUM_KEPT_CHECKPOINTS, has_fast_bfloat16, peak_memory_gib, train

logger = logging.getLogger(__name__)


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
    target = find_target(config)
    finished = finished_run(config, target.folder)
    if finished is not None:
        return finished
    if not config.dry_run:
        check_folder(config, target)
    plan = make_plan(config, target)
    if config.dry_run:
        return planned_result(config, plan)
    if plan.source.gguf_file is None:
        plan.source.weight_files()
    # A checkpoint on the way holds float32 weights and the optimizer's two moments.
    check_space(plan.folder, 12 * plan.num_parameters * (NUM_KEPT_CHECKPOINTS + 1))
    resume_from = open_folder(config, plan)
    with disk_errors_explained(plan.folder):
        return _run(config, plan, resume_from)


def _run(config: FinetuneConfig, plan: FinetunePlan, resume_from: Path | None) -> dict[str, Any]:
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
    report = apply_resolution(model, plan.resolution)
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

    def __init__(self, config: FinetuneConfig, plan: FinetunePlan, mixed_precision: bool) -> None:
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


def _control_batch(plan: FinetunePlan, pieces: SampleSet) -> int:
    """The batch that gives the control as many tokens a step as the extended model has."""
    return max(1, round(plan.recipe.batch_size * len(pieces) / len(plan.samples)))


def _lengths(window: int, target: int) -> list[int]:
    """The original window, its doublings up to the target, and twice the target."""
    return sorted({*doublings(window, target), target, 2 * target})


def _stored_dtype(source: ModelSource, config: FinetuneConfig) -> torch.dtype:
    """The dtype of the final checkpoint: the given one, else the source's own."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if source.gguf_file is not None:
        return torch.float32
    raw = source.config()
    return getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32")


def _write_final(config: FinetuneConfig, plan: FinetunePlan, model: PreTrainedModel, result: dict[str, Any]) -> None:
    scaling = plan.resolution.scaling
    model.save_pretrained(plan.folder)
    if plan.source.gguf_file is None:
        copy_tokenizer(plan.source.folder, plan.folder, scaling.max_position_embeddings)
    else:
        save_tokenizer(plan.tokenizer, plan.folder, scaling.max_position_embeddings)
    write_model_card(
        plan.folder,
        plan.report,
        base_model=plan.source.name,
        revision=plan.source.revision,
        results=_results_text(result),
    )
    write_run_record(plan.folder, run_record("finetune", run_settings(config, plan), result))
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


def _recipe_text(plan: FinetunePlan) -> str:
    recipe, samples = plan.recipe, plan.samples
    return (
        f"{len(samples)} samples, {samples.num_tokens:,} tokens, {recipe.num_steps(len(samples))} steps of "
        f"{recipe.batch_size}, learning rate {recipe.learning_rate:g}"
    )
