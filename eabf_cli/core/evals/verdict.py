"""Is the extended model worth it for these documents? Against what its user would do otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.evals.judgement import EXTENDED, EXTENDED_INSIDE, LAST_WINDOW, RETRIEVED, YARN, judge
from eabf_cli.core.evals.report import write_result
from eabf_cli.core.evals.rows import Row
from eabf_cli.core.evals.scoring import score_rows
from eabf_cli.core.evals.verdict_plan import VerdictPlan, make_plan
from eabf_cli.core.evals.verdict_rows import Stretch, last_window, retrieved_chunks, stretch_row, whole_text
from eabf_cli.core.evals.verdict_settings import VerdictConfig
from eabf_cli.core.patching import apply_resolution, describe_patch, remove_method
from eabf_cli.core.sources import ModelSource

logger = logging.getLogger(__name__)

__all__ = ["VerdictConfig", "verdict"]


def verdict(config: VerdictConfig) -> dict[str, Any]:
    """Compare an extended model with what its user would do otherwise, on the same tokens of the same documents.

    Stretches of text that lie beyond the original window are predicted by the extended model, which sees all text
    before them up to its window; by the original model on its last window of tokens; by the original on chunks that
    BM25 retrieves and the text just before; and by the original under YaRN for the extended window, without training.

    Returns:
        `model`, `revision`, `method`, `original`, `original_reason`, `original_max_position_embeddings`,
        `max_position_embeddings`, `length`, `target_tokens` (of a stretch), `dataset`, `data_hash`, `seed`,
        `num_documents`, `num_stretches`, `notes`, `device`, `dtype`, `output`; unless it is a dry run also `verdict`
        (see `judge`), `weights`, `original_weights` (their hashes), `wall_s`, `peak_memory_gib`.

    Raises:
        EabfError: whatever a user can put right.
    """
    started = time.perf_counter()
    plan = make_plan(config)
    result = plan.describe()
    if config.run.dry_run:
        return result
    for note in plan.notes:
        logger.info("%s", note[0].upper() + note[1:])
    result |= {
        "verdict": judge(_measure(plan), plan.stretches, _titles(plan), config),
        "weights": plan.subject.source.fingerprint(),
        "original_weights": plan.original.source.fingerprint(),
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(plan.device),
    }
    if config.run.output is not None:
        write_result(result, config, config.run.output, overwrite=config.run.overwrite)
    return result


def _titles(plan: VerdictPlan) -> dict[str, str]:
    return {
        EXTENDED: "extended model, all text before",
        LAST_WINDOW: f"original, last {plan.window:,} tokens",
        RETRIEVED: "original, chunks found by BM25",
        YARN: f"YaRN x{plan.yarn.scaling.factor:g} without training, all text before",
        EXTENDED_INSIDE: f"extended model, last {plan.window:,} tokens",
    }


def _measure(plan: VerdictPlan) -> dict[str, list[float]]:
    """The loss of every stretch under every way of reading; one model is in memory at a time."""
    whole, recent = _rows(plan, whole_text), _rows(plan, lambda stretch: last_window(stretch, plan.room))
    retrieved = _rows(plan, partial(_retrieved, plan))
    losses = {}
    model = _load(plan, plan.subject.source)
    losses[EXTENDED] = _score(plan, model, whole, "the extended model")
    losses[EXTENDED_INSIDE] = _score(plan, model, recent, "the extended model on the last window")
    del model
    model = _load(plan, plan.original.source)
    losses[LAST_WINDOW] = _score(plan, model, recent, "the original on the last window")
    losses[RETRIEVED] = _score(plan, model, retrieved, "the original on what BM25 finds")
    if describe_patch(model) is not None:
        remove_method(model)
    apply_resolution(model, plan.yarn)
    losses[YARN] = _score(plan, model, whole, "YaRN without training")
    return losses


def _retrieved(plan: VerdictPlan, stretch: Stretch) -> tuple[int, ...]:
    return retrieved_chunks(
        stretch,
        plan.room,
        plan.tokenizer,
        chunk_tokens=plan.chunk_tokens,
        query_tokens=plan.query_tokens,
        share=plan.config.retrieved_share,
    )


def _rows(plan: VerdictPlan, context: Callable[[Stretch], tuple[int, ...]]) -> list[Row]:
    return [stretch_row(number, plan.bos, context(stretch), stretch) for number, stretch in enumerate(plan.stretches)]


def _load(plan: VerdictPlan, source: ModelSource) -> PreTrainedModel:
    return load_model(source.name, revision=source.revision, dtype=plan.dtype, device=str(plan.device))


def _score(plan: VerdictPlan, model: PreTrainedModel, rows: Sequence[Row], name: str) -> list[float]:
    logger.info("Measuring %s", name)
    scores = score_rows(model, rows, batch_tokens=plan.config.run.evaluation.batch_tokens)
    return [scores[number][0].mean_nll for number in range(len(rows))]
