"""The main job: extend a model, finetune it on a few long samples, prove it, write the checkpoint."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from eabf_cli.core.card.base_card import read_base_card
from eabf_cli.core.checkpoint import load_model, stored_dtype
from eabf_cli.core.data.sample_set import SampleSet
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.devices import choose_device, peak_memory_gib, torch_dtype
from eabf_cli.core.errors import TrainingInterrupted
from eabf_cli.core.evals.table import format_table, measured_models
from eabf_cli.core.evaluation import evaluate
from eabf_cli.core.files import check_space, disk_errors_explained
from eabf_cli.core.finetune.control import cut_samples
from eabf_cli.core.finetune.interrupts import terminated_as_interrupted
from eabf_cli.core.finetune.manifest import elapsed_at
from eabf_cli.core.finetune.memory_plan import run_memory_explained
from eabf_cli.core.finetune.metrics import plot_loss
from eabf_cli.core.finetune.plan import FinetuneConfig, FinetunePlan, find_target, make_plan, planned_result
from eabf_cli.core.finetune.probe import probe
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.restoration import AdapterTeacher, FrozenTeacher, Restoration, Teacher
from eabf_cli.core.finetune.run_folder import (
    as_started,
    check_folder,
    check_unchanged,
    finished_run,
    forget_measurements,
    keep_measurement,
    kept_measurement,
    open_folder,
    run_settings,
)
from eabf_cli.core.finetune.sharding import check_sharding_config
from eabf_cli.core.finetune.training import TrainResult, train
from eabf_cli.core.finetune.tuning import load_for_tuning, make_trainable, merge_tuned, put_method
from eabf_cli.core.frequencies import doublings
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patch_checkpoint import copy_tokenizer, save_tokenizer
from eabf_cli.core.processes import (
    is_main_process,
    is_sharded,
    join_processes,
    leave_processes,
    num_processes,
    num_replicas,
    wait_for_everyone,
)
from eabf_cli.core.run_record import run_record, write_run_record

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
_CONTROL_FOLDER = "control"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Extend a model's window and finetune it on a few long samples (arXiv 2401.07004, section 4.1).

    The run lives in its folder: settings first, `checkpoint-N/` while it trains, the final checkpoint in
    the form of docs/method.md, and `eabf_run.json` last. Several processes (torchrun, accelerate launch)
    train together; the main one measures and writes.

    Returns:
        the result, ready for JSON (docs/api.md).

    Raises:
        EabfError: anything the user can put right, before weights are loaded where it can be known.
        TrainingInterrupted: SIGINT or SIGTERM once the run's folder is there; the message says how to go on.
    """
    torch_dtype(config.dtype)
    if config.probe or not config.dry_run:
        check_sharding_config(choose_device(config.device))
    join_processes(choose_device(config.device).type)
    finished = finished_run(config, config.output)
    if finished is not None:
        return finished
    target = find_target(config)
    # The default folder may be there from an earlier run, which a look at the plan does not mind.
    if config.output is not None or config.resume or not config.dry_run:
        check_folder(config, target)
        # None may find, and refuse, what a faster one has made of the folder.
        wait_for_everyone()
    if config.resume:
        finished = finished_run(config, target.folder)
        if finished is not None:
            return finished
        config = as_started(config, target)
    plan = make_plan(config, target)
    if config.dry_run and not config.probe:
        return planned_result(plan)
    if plan.source.gguf_file is None:
        plan.source.weight_files()
    if config.dry_run:
        with run_memory_explained(plan.memory_settings, choose_device(config.device)):
            return planned_result(plan) | {"probe": _Run(config, plan).probe()}
    if config.resume:
        check_unchanged(config, plan)
    check_space(plan.folder, plan.disk_bytes)
    way_out = f"make room, and the same command with --resume -o {plan.folder} goes on"
    with disk_errors_explained(plan.folder, way_out=way_out), terminated_as_interrupted():
        resume_from = open_folder(config, plan)
        try:
            with run_memory_explained(plan.memory_settings, choose_device(config.device)):
                return _Run(config, plan).carry_out(resume_from)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, TrainingInterrupted) and not is_main_process():
                # The main process tells it; a launcher would end that one as soon as another fails.
                return {}
            done = f"{interrupt}; " if str(interrupt) else ""
            raise TrainingInterrupted(f"{done}the same command with --resume -o {plan.folder} goes on") from None
        finally:
            leave_processes()


class _Run:
    """One run: what it measures, trains and writes."""

    def __init__(self, config: FinetuneConfig, plan: FinetunePlan) -> None:
        self.config = config
        self.plan = plan
        self.device = choose_device(config.device)
        # A model that is sharded is put on its devices part by part.
        self.load_device = torch.device("cpu") if is_sharded() else self.device
        self.mixed_precision = plan.settings.mixed_precision
        self.final_dtype = stored_dtype(plan.source) if config.dtype == "auto" else getattr(torch, config.dtype)

    def carry_out(self, resume_from: Path | None) -> dict[str, Any]:
        """Everything, in order; the result is the main process's, the others have none."""
        config, plan = self.config, self.plan
        # The seconds of earlier attempts count.
        started = time.perf_counter() - elapsed_at(resume_from).wall_s
        set_seed(config.seed)
        measured: dict[str, Any] = {}
        if config.control:
            measured["control"] = self._once("control", self._control)
        model = self._load()
        teacher = self._frozen_teacher(model)
        measured["original"], measured["before"] = self._patch(model)
        tuned = self._trainable(model)
        restoration = self._restoration(model, tuned, teacher)
        del model
        training = self._train(
            tuned,
            plan.rows,
            plan.row_recipe,
            plan.folder,
            settings=plan.settings,
            collator=plan.collator,
            restoration=restoration,
            resume_from=resume_from,
            run_started=started,
        )
        if not is_main_process():
            wait_for_everyone()
            return {}
        finished = self._merged(tuned, training).to(self.device)
        del tuned
        measured["after"] = self._evaluate(finished, "finetuned")
        result = planned_result(plan) | {
            "revision": plan.source.revision,
            "num_tokens": training.num_tokens,
            "train_loss": training.losses,
            "tokens_per_s": training.tokens_per_s,
            "device": str(self.device),
            "num_processes": num_processes(),
            **{name: measured.get(name) for name in ("original", "before", "after", "control")},
            "train_s": training.wall_s,
            "wall_s": time.perf_counter() - started,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self._write(finished, result)
        wait_for_everyone()
        return result

    def probe(self) -> dict[str, Any]:
        """Two real steps on the longest row: the memory and time that the run will need."""
        plan = self.plan
        model = self._load()
        teacher = self._frozen_teacher(model)
        put_method(model, plan.resolution)
        tuned = self._trainable(model)
        found = probe(
            tuned,
            plan.rows,
            plan.row_recipe,
            settings=plan.settings,
            collator=plan.collator,
            device=self.device,
            restoration=self._restoration(model, tuned, teacher, share=1.0),
        )
        return found.to_dict()

    # ---- Models --------------------------------------------------------------------------------------

    def _load(self) -> PreTrainedModel:
        """The model that training starts from, as it is stored."""
        config = self.config
        return load_for_tuning(
            config.model,
            revision=config.revision,
            tuning=self.plan.tuning,
            device=str(self.load_device),
            mixed_precision=self.mixed_precision,
        )

    def _patch(self, model: PreTrainedModel) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Apply the method to a model, and measure it before and after that.

        What is measured is never quantised or sharded, so that its figures can be compared with the final model's.
        """
        subject = model
        if (self.plan.tuning == "qlora" or is_sharded()) and self.config.evaluation and is_main_process():
            dtype = "bfloat16" if self.mixed_precision else "float32"
            subject = load_model(
                self.config.model, revision=self.config.revision, dtype=dtype, device=self.config.device
            )
        original = self._once("original", lambda: self._evaluate(subject, "original"))
        put_method(model, self.plan.resolution)
        if subject is not model:
            put_method(subject, self.plan.resolution)
        return original, self._once("before", lambda: self._evaluate(subject, "patched"))

    def _trainable(self, model: PreTrainedModel) -> PreTrainedModel:
        plan, config = self.plan, self.config
        return make_trainable(model, plan.tuning, source=plan.source, settings=config.lora, seed=config.seed)

    def _frozen_teacher(self, model: PreTrainedModel) -> Teacher | None:
        """The original model beside one whose weights all change."""
        if self.config.restoration is None or self.plan.tuning != "full":
            return None
        return FrozenTeacher(model, self.final_dtype if self.mixed_precision else torch.float32)

    def _restoration(
        self, model: PreTrainedModel, tuned: PreTrainedModel, teacher: Teacher | None, *, share: float | None = None
    ) -> Restoration | None:
        config = self.config.restoration
        if config is None:
            return None
        return Restoration(
            config if share is None else replace(config, share=share),
            model=model,
            teacher=teacher or AdapterTeacher(tuned, self.plan.resolution, self.plan.stored),
            window=self.plan.window,
            bos_token_id=self.plan.tokenizer.bos_token_id,
            seed=self.config.seed,
        )

    def _merged(self, tuned: PreTrainedModel, training: TrainResult) -> PreTrainedModel:
        """The trained model as a plain one; a sharded model's weights, gathered, go into a whole one first."""
        if training.gathered_weights is not None:
            whole = self._load()
            put_method(whole, self.plan.resolution)
            tuned = self._trainable(whole)
            tuned.load_state_dict(training.gathered_weights)
        if self.plan.tuning != "full":
            tuned.save_pretrained(self.plan.folder / ADAPTER_FOLDER)
        return merge_tuned(tuned, self.final_dtype)

    # ---- Training and measuring ----------------------------------------------------------------------

    def _train(
        self,
        model: PreTrainedModel,
        samples: SampleSet,
        recipe: Recipe,
        folder: Path,
        **options: Any,
    ) -> TrainResult:
        logger.info(
            "Training on %s: %s samples, %s tokens, %s steps of %s, learning rate %s, %s",
            self.device, len(samples), f"{samples.num_tokens:,}", recipe.num_steps(len(samples)), recipe.batch_size,
            f"{recipe.learning_rate:g}", "bfloat16 autocast" if self.mixed_precision else "float32",
        )  # fmt: skip
        try:
            training = train(model, samples, recipe, folder=folder, device=self.device, **options)
        except BaseException:
            # What stopped the training is what is told: where memory is out, a picture cannot be drawn either.
            with contextlib.suppress(Exception):
                self._plot(folder)
            raise
        self._plot(folder)
        return training

    def _plot(self, folder: Path) -> None:
        if is_main_process():
            plot_loss(folder)

    def _evaluate(self, model: PreTrainedModel, name: str) -> dict[str, Any] | None:
        """Measure a model at the same lengths as the others, the target's among them; the main process alone does."""
        evaluation = self.config.evaluation
        if evaluation is None or not is_main_process():
            return None
        if evaluation.lengths is None:
            evaluation = evaluation.replace(lengths=tuple(_lengths(self.plan.window, self.plan.target_window)))
        logger.info("Evaluating the %s model", name)
        return evaluate(model, self.plan.tokenizer, evaluation)

    def _once(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Measure, or take what this run measured before it was interrupted."""
        kept = kept_measurement(self.plan.folder, name)
        if kept is not None:
            return kept
        measured = measure()
        if measured is not None and is_main_process():
            keep_measurement(self.plan.folder, name, measured)
        return measured

    def _control(self) -> dict[str, Any]:
        """The same tokens cut to the original window, the same number of steps, no method."""
        plan = self.plan
        pieces = cut_samples(plan.samples, plan.window, plan.tokenizer.bos_token_id)
        recipe = replace(plan.recipe, batch_size=_control_batch(plan, pieces))
        folder = plan.folder / _CONTROL_FOLDER
        folder.mkdir(exist_ok=True)
        logger.info("Training the control: the same samples cut to %s tokens, no method", f"{plan.window:,}")
        tuned = self._trainable(self._load())
        training = self._train(
            tuned,
            pieces,
            recipe,
            folder,
            settings=replace(plan.settings, save_steps=None),
            collator=SampleCollator.from_tokenizer(plan.tokenizer),
        )
        measured = {"train_loss": training.losses, "num_steps": training.num_steps, "num_tokens": training.num_tokens}
        if self.config.evaluation is None or not is_main_process():
            return measured
        model = merge_tuned(tuned, self.final_dtype).to(self.device)
        return (self._evaluate(model, "control") or {}) | measured

    # ---- Writing -------------------------------------------------------------------------------------

    def _write(self, model: PreTrainedModel, result: dict[str, Any]) -> None:
        plan, folder = self.plan, self.plan.folder
        if self.config.merge or plan.tuning == "full":
            model.to(self.final_dtype).save_pretrained(folder)
            if plan.source.gguf_file is None:
                copy_tokenizer(plan.source.folder, folder, plan.target_window)
            else:
                save_tokenizer(plan.tokenizer, folder, plan.target_window)
            write_model_card(
                folder,
                plan.report,
                base_model=plan.source.name,
                revision=plan.source.revision,
                base_card=read_base_card(plan.source.folder),
                run=result,
            )
        write_run_record(folder, run_record("finetune", run_settings(self.config, plan), result))
        forget_measurements(folder)
        for left in (*folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / _CONTROL_FOLDER):
            shutil.rmtree(left, ignore_errors=True)


def _control_batch(plan: FinetunePlan, pieces: SampleSet) -> int:
    """The batch that gives the control about as many tokens a step as the extended model has."""
    share = plan.settings.micro_batch_size * num_replicas()
    return share * max(1, round(plan.recipe.batch_size * len(pieces) / len(plan.samples) / share))


def _lengths(window: int, target: int) -> list[int]:
    """The original window, its doublings up to the target, and twice the target."""
    return sorted({*doublings(window, target), target, 2 * target})


def comparison_table(result: dict[str, Any]) -> str:
    """The before-and-after table of a finetune result; empty if nothing was measured."""
    measured = measured_models(result)
    return format_table(measured) if measured else ""
