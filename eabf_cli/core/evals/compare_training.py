"""The training runs of a comparison: the same samples and the same recipe under every contender."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from eabf_cli.core.evals.compare_plan import ComparePlan, Contender
from eabf_cli.core.finetune.run import FinetuneConfig, finetune
from eabf_cli.core.run_record import read_run_record
from eabf_cli.core.run_settings import SETTINGS_FILE

logger = logging.getLogger(__name__)

_PLANNED = (
    *("num_samples", "num_rows", "num_truncated", "num_dropped", "num_split", "data_notes"),
    *("num_steps", "num_tokens", "tuning", "tuning_reason", "recipe", "memory"),
)


def planned_training(plan: ComparePlan) -> dict[str, Any]:
    """What one run will do; it refuses bad data and recipes before anything is measured."""
    contender = next(found for found in plan.contenders if found.kind == "method")
    planned = finetune(_config(plan, contender, plan.config.seeds[0], dry_run=True))
    return {name: planned[name] for name in _PLANNED}


def train_contender(plan: ComparePlan, contender: Contender, seed: int, output: Path) -> dict[str, Any]:
    """The record of a contender's run, which is trained if it is not yet, or not to its end.

    Raises:
        EabfError, TrainingInterrupted: see `finetune`.
    """
    record = read_run_record(output) if output.is_dir() else None
    if record is not None:
        return record
    logger.info("Finetuning %s, seed %s", contender.name, seed)
    resume = (output / SETTINGS_FILE).is_file()
    return finetune(_config(plan, contender, seed, output=output, resume=resume))


def _config(plan: ComparePlan, contender: Contender, seed: int, **options: Any) -> FinetuneConfig:
    config, run = plan.config, plan.config.run
    assert contender.request is not None
    return FinetuneConfig(
        model=run.model,
        revision=run.revision,
        request=contender.request,
        dataset=config.train_source,
        dataset_split=config.train_dataset_split,
        samples=config.samples,
        too_long=config.too_long,
        cut_to_window=contender.is_cut,
        preset=config.preset,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        tuning=config.tuning,
        dtype=run.dtype,
        device=run.device,
        trust_remote_code=run.trust_remote_code,
        seed=seed,
        evaluation=None,
        show_progress=run.show_progress,
        **options,
    )
