"""The same model under each method, on the same text and prompts, untrained or finetuned on the same samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.errors import InvalidConfigError, TrainingInterrupted
from eabf_cli.core.evals.compare_folder import CompareFolder, check_resumable
from eabf_cli.core.evals.compare_plan import ORIGINAL, ComparePlan, Contender, make_plan
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.comparisons import Bootstrap, difference_entries, interval_entries, summary_sentences
from eabf_cli.core.evals.report import write_files
from eabf_cli.core.evals.run import measure
from eabf_cli.core.evals.scored_model import ScoredModel, pool_results
from eabf_cli.core.patching import apply_resolution, describe_patch, remove_method

logger = logging.getLogger(__name__)

__all__ = ["CompareConfig", "compare"]

# What a training run's record says of it, for the comparison's result.
_RUN_KEYS = (
    "seed", "output", "num_samples", "num_rows", "num_steps", "num_tokens", "train_loss", "tuning", "recipe",
    "data_hash", "train_s",
)  # fmt: skip


def compare(config: CompareConfig) -> dict[str, Any]:
    """Measure a model under several methods, and say how sure their differences are.

    Untrained, beside the model as it stands; or each finetuned on the same samples by the same recipe, beside that
    and two controls without a method: trained on the same samples cut to the original window, and on the long ones.

    Returns:
        `model`, `revision`, `original_max_position_embeddings`, `max_position_embeddings`, `factor`, `lengths`,
        `methods`, `reference`, `dataset`, `data_hash`, `finetuned`, `seed`, `seeds`, `training` (what one run does),
        `notes`, `output` and what else the plan tells. Unless it is a dry run also `compare`: name -> the contender's
        `evaluate` result (of several seeds averaged, see `pool_results`) with `title`, `kind`, `factor`, `rope_theta`,
        `unscaled_layers`, `intervals` (`interval_entries`) and, if trained, `runs`; `differences`
        (`difference_entries`); `summary` (sentences); `weights` (their hash), `wall_s`, `peak_memory_gib`.

    Raises:
        EabfError: whatever a user can put right.
        TrainingInterrupted: SIGINT or SIGTERM; what was measured and trained stays in the folder for `resume`.
    """
    started = time.perf_counter()
    check_resumable(config)
    plan = make_plan(config)
    output = config.run.output
    if output is None and config.finetune:
        stem = Path(plan.source.name).name.removesuffix(".gguf")
        output = Path("eabf-runs") / f"{stem}-compare-x{plan.target_window / plan.window:g}"
    result = plan.describe() | {"output": None if output is None or config.run.dry_run else str(output)}
    if config.finetune:
        from eabf_cli.core.evals.compare_training import planned_training

        result["training"] = planned_training(plan)
        result["notes"] += result["training"]["data_notes"]
    # The default folder may be there from an earlier run, which a look at the plan does not mind.
    target = config.run.output if config.run.dry_run else output
    folder = None if target is None else CompareFolder(plan, target)
    if config.run.dry_run:
        return result | plan.needs()
    finished = folder.finished() if folder is not None else None
    if finished is not None:
        return finished
    for note in result["notes"]:
        logger.info("%s", note[0].upper() + note[1:])
    try:
        result |= _Comparison(plan, folder).carry_out()
    except KeyboardInterrupt:
        if folder is None or not folder.is_open:
            raise
        raise TrainingInterrupted(f"the same command with --resume -o {folder.folder} goes on") from None
    result |= {
        "weights": plan.source.fingerprint(),
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(plan.measuring.device),
    }
    if folder is not None:
        folder.open()
        write_files(result, config, folder.folder)
        folder.forget()
    return result


class _Comparison:
    """Measures every contender of a plan, and what is kept of an interrupted comparison not again."""

    def __init__(self, plan: ComparePlan, folder: CompareFolder | None) -> None:
        self.plan = plan
        self.config = plan.config
        self.folder = folder
        self.key_tokens: tuple[tuple[bool, ...], ...] | None = None

    def carry_out(self) -> dict[str, Any]:
        scored = {ORIGINAL: [self._measured(ORIGINAL, self._plain_model)]}
        # The original chooses the key tokens for all.
        self.key_tokens = scored[ORIGINAL][0].key_tokens or None
        runs: dict[str, list[dict[str, Any]]] = {}
        if self.config.finetune:
            for name, found in self._trained().items():
                scored[name] = [model for model, _ in found]
                runs[name] = [record for _, record in found]
        else:
            scored |= self._untrained()
        return self._result(scored, runs)

    def _untrained(self) -> dict[str, list[ScoredModel]]:
        scored = {}
        model: PreTrainedModel | None = None
        for contender in self.plan.contenders:
            if contender.resolution is None:
                continue
            kept = self._kept(contender.name)
            if kept is None:
                model = model if model is not None else self._plain_model()
                if describe_patch(model) is not None:
                    remove_method(model)
                apply_resolution(model, contender.resolution)
                kept = self._measure(contender.name, model)
            scored[contender.name] = [kept]
        return scored

    def _trained(self) -> dict[str, list[tuple[ScoredModel, dict[str, Any]]]]:
        # The training stack takes long to import, and untrained models do without.
        from eabf_cli.core.evals.compare_training import train_contender

        assert self.folder is not None
        self.folder.open()
        found: dict[str, list[tuple[ScoredModel, dict[str, Any]]]] = {}
        contenders = [contender for contender in self.plan.contenders if contender.request is not None]
        for seed in self.config.seeds:
            data_hash = None
            for contender in contenders:
                record = train_contender(self.plan, contender, seed, self.folder.run_folder(contender.name, seed))
                data_hash = data_hash or record["data_hash"]
                if record["data_hash"] != data_hash:
                    raise InvalidConfigError(
                        f"run {record['output']} was trained on other samples than those before it: the data set has "
                        "changed since the comparison began, start anew with --overwrite"
                    )
                scored = self._measured(f"{contender.name}-seed{seed}", partial(self._load, record["output"]))
                found.setdefault(contender.name, []).append((scored, {key: record.get(key) for key in _RUN_KEYS}))
        return found

    # ---- Measuring -----------------------------------------------------------------------------------

    def _plain_model(self) -> PreTrainedModel:
        return self._load(self.plan.source.name, self.config.run.revision)

    def _load(self, model: str, revision: str | None = None) -> PreTrainedModel:
        return load_model(
            model, revision=revision, dtype=self.plan.measuring.dtype, device=str(self.plan.measuring.device)
        )

    def _kept(self, name: str) -> ScoredModel | None:
        return None if self.folder is None else self.folder.kept(name)

    def _measured(self, name: str, load: Callable[[], PreTrainedModel]) -> ScoredModel:
        kept = self._kept(name)
        return self._measure(name, load()) if kept is None else kept

    def _measure(self, name: str, model: PreTrainedModel) -> ScoredModel:
        logger.info("Measuring %s", name)
        measured = measure(self.plan.measuring, model, key_tokens=self.key_tokens)
        scored = ScoredModel.of(measured, has_key_tokens=self.plan.compares_key_tokens)
        if self.folder is not None:
            self.folder.keep(name, scored)
        return scored

    # ---- The result ----------------------------------------------------------------------------------

    def _result(self, scored: dict[str, list[ScoredModel]], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        bootstrap = Bootstrap(
            seed=self.config.run.seed,
            num_resamples=self.config.num_resamples,
            confidence=self.config.confidence,
        )
        scores = {name: [model.scores for model in models] for name, models in scored.items()}
        differences = difference_entries(
            scores,
            self.config.reference_method,
            bootstrap,
            window=self.plan.window,
            target_window=self.plan.target_window,
        )
        compared = {}
        for contender in self.plan.contenders:
            entry = pool_results([model.result for model in scored[contender.name]]) | _numbers(contender)
            entry["intervals"] = interval_entries(scores[contender.name], bootstrap)
            if contender.name in runs:
                entry["runs"] = runs[contender.name]
            compared[contender.name] = entry
        return {"compare": compared, "differences": differences, "summary": summary_sentences(differences)}


def _numbers(contender: Contender) -> dict[str, Any]:
    """What a contender is, and the numbers of its method."""
    scaling = None if contender.resolution is None else contender.resolution.scaling
    # The original's method is the one that it was found under; a control's checkpoint is called one, and has none.
    method = {} if contender.kind == "original" else {"method": None if scaling is None else scaling.method}
    return {
        "title": contender.title,
        "kind": contender.kind,
        **method,
        "factor": None if scaling is None else scaling.factor,
        "rope_theta": None if scaling is None else scaling.rope_theta,
        "unscaled_layers": None if scaling is None else list(scaling.unscaled_layers or ()),
    }
