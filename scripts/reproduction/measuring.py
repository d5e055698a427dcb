"""One cell: train, measure, and keep the score of every document and trial."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import WANTED_HALF_WIDTH, Cell
from study_loss import WeightedCollator, longce_weights
from study_methods import GAIN_NAME, apply_study_method, study_methods
from transformers import PreTrainedModel, set_seed
from variants import Variant

from eabf_cli import RopeScalingConfig, load_model, load_tokenizer
from eabf_cli.core.data.records import open_records
from eabf_cli.core.data.samples import DataConfig, SampleCollator, load_samples
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.devices import has_fast_bfloat16
from eabf_cli.core.evals.retrieval import wilson_interval
from eabf_cli.core.evals.scored_model import ScoredModel
from eabf_cli.core.evals.settings import EvalConfig
from eabf_cli.core.evaluation import evaluate_scores
from eabf_cli.core.finetune.recipe import recipe_for
from eabf_cli.core.finetune.restoration import FrozenTeacher, Restoration
from eabf_cli.core.finetune.settings import RestorationConfig, TrainSettings
from eabf_cli.core.finetune.training import TrainResult, train
from eabf_cli.core.report import PatchReport
from eabf_cli.core.run_record import source_commit

_SIZES: dict[str, dict[str, Any]] = {
    # What is chosen by is measured on other documents, other prompts and other wordings than what is reported.
    "dev": {
        "tasks": ("perplexity", "context_gain", "multi_key", "repeated_span"),
        "num_multi_key_texts": 12,
        "num_span_prompts": 6,
    },
    "test": {
        "tasks": ("perplexity", "context_gain", "passkey", "needles", "repeated_span"),
        "num_passkey_trials": 45,
        "num_needle_prompts": 26,
        "num_span_prompts": 12,
    },
}
_NUM_DOCUMENTS = 24
_DEV_EVERY = 4
_DEV_SEED = 1_000_000

# Shares near 0 and 1 are known well from few passkeys; where they are not, more are asked for.
_NUM_MORE_PASSKEYS = 90
_NUM_POOLED_SEEDS = 3


@study_methods()
def measure_cell(cell: Cell) -> dict[str, Any]:
    """Train a cell's model and measure it.

    Returns:
        `cell`, `rope_theta`, `unscaled_layers`, `training` (None without it), `scores` (the JSON form of
        `UnitScores`), `effective_length`, `gains` (of a learned scale, by layer and head), `wall_s`, `torch`.
    """
    started = time.perf_counter()
    tokenizer = load_tokenizer(DEMO_MODEL)
    set_seed(cell.seed)
    model = load_model(DEMO_MODEL, dtype="float32")
    report, training = None, None
    if cell.variant is not None:
        report, training = _extend(model, tokenizer, cell, cell.variant)
    model = _as_stored(model, cell.variant)
    scores, effective_length = _measure(model, tokenizer, cell)
    found: dict[str, Any] = {"scores": scores, "effective_length": effective_length}
    if training is not None:
        found["training"] = {
            "num_steps": training.num_steps,
            "num_tokens": training.num_tokens,
            "losses": [round(loss, 4) for loss in training.losses],
            "wall_s": round(training.wall_s, 1),
        }
    if gains := _gains(model):
        found["gains"] = gains
    return record(cell, report, found, started=started)


def record(cell: Cell, report: PatchReport | None, found: dict[str, Any], *, started: float) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        report: of the method, if one was applied.
        found: what was measured.
        started: by `time.perf_counter`.
    """
    return {
        "cell": asdict(cell),
        "rope_theta": None if report is None else report.rope_theta,
        "unscaled_layers": None if report is None else list(report.unscaled_layers),
        "training": None,
        **found,
        "wall_s": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "commit": source_commit(),
    }


def _gains(model: PreTrainedModel) -> list[list[float]]:
    """softplus(a_h) of every layer with a learned scale, by head; EABF's value is 1 / ln c."""
    found = [value for name, value in model.named_parameters() if name.endswith(GAIN_NAME)]
    return [[round(gain, 4) for gain in torch.nn.functional.softplus(value.detach()).tolist()] for value in found]


def _extend(model: PreTrainedModel, tokenizer: Any, cell: Cell, variant: Variant) -> tuple[Any, TrainResult | None]:
    """Apply the method and train in place."""
    restores = variant.loss == "restoration" and cell.num_samples > 0
    teacher = FrozenTeacher(model, torch.float32) if restores else None
    report = _apply(model, variant)
    if cell.num_samples == 0:
        return report, None
    samples = load_samples(DataConfig(num_samples=cell.num_samples, seed=cell.seed), tokenizer)
    recipe = recipe_for(model.num_parameters(), len(samples), learning_rate=variant.learning_rate)
    collator = SampleCollator.from_tokenizer(tokenizer)
    if variant.loss == "longce":
        window = report.original_max_position_embeddings
        weights = longce_weights(model, samples, context=window // 2, stride=window // 4)
        collator = WeightedCollator(collator.pad_token_id, weights)
    restoration = None
    if teacher is not None:
        restoration = Restoration(
            RestorationConfig(share=1.0),
            model=model,
            teacher=teacher,
            window=report.original_max_position_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            seed=cell.seed,
        )
    with tempfile.TemporaryDirectory() as folder:
        training = train(
            model,
            samples,
            recipe,
            TrainSettings(seed=cell.seed, mixed_precision=has_fast_bfloat16(model.device)),
            folder=Path(folder),
            collator=collator,
            restoration=restoration,
        )
    return report, training


def _as_stored(trained: PreTrainedModel, variant: Variant | None) -> PreTrainedModel:
    """The model as its checkpoint would be loaded: bfloat16 weights, everything else computed as it is there."""
    model = load_model(DEMO_MODEL, dtype="bfloat16")
    if variant is not None:
        _apply(model, variant)
    # After the method, which may bring parameters of its own.
    model.load_state_dict(trained.state_dict())
    return model


def _apply(model: PreTrainedModel, variant: Variant) -> PatchReport:
    return apply_study_method(
        model,
        RopeScalingConfig(
            method=variant.method,
            factor=variant.factor,
            rope_theta=variant.rope_theta,
            unscaled_layers=variant.unscaled_layers,
        ),
    )


def _measure(model: PreTrainedModel, tokenizer: Any, cell: Cell) -> tuple[dict[str, Any], int | None]:
    is_dev = cell.split == "dev"
    texts = [record().text or "" for record in open_records(DEMO_DATASET, split="heldout")]
    documents = [text for index, text in enumerate(texts) if (index % _DEV_EVERY == _DEV_EVERY - 1) == is_dev]
    config = EvalConfig(
        lengths=cell.lengths,
        documents=tuple(documents),
        num_documents=_NUM_DOCUMENTS,
        seed=cell.seed + (_DEV_SEED if is_dev else 0),
        **_SIZES[cell.split],
    )
    measured = evaluate_scores(model, tokenizer, config)
    scored = ScoredModel.of(measured, has_key_tokens=False).to_dict()
    values, clusters = scored["values"], scored["clusters"]
    if not is_dev:
        unsure = [length for length in cell.lengths if not _is_known(values["passkey"][str(length)])]
        if unsure:
            more = config.replace(
                tasks=("passkey",), lengths=tuple(unsure), num_passkey_trials=_NUM_MORE_PASSKEYS, seed=config.seed + 500
            )
            for length, found in evaluate_scores(model, tokenizer, more).trials["passkey"].items():
                values["passkey"][str(length)] += found
                clusters["passkey"][str(length)] = list(range(len(values["passkey"][str(length)])))
    return {"values": rounded(values), "clusters": clusters}, measured.result["effective_length"]


def _is_known(trials: list[float]) -> bool:
    """Whether so many trials from each of three seeds give a share as exactly as is wanted."""
    low, high = wilson_interval(round(sum(trials)) * _NUM_POOLED_SEEDS, len(trials) * _NUM_POOLED_SEEDS)
    return high - low <= 2 * WANTED_HALF_WIDTH


def rounded(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Short numbers: whole ones as such, losses to 1e-5 nats."""
    return {
        name: {
            length: [int(value) if value == int(value) else round(value, 5) for value in found]
            for length, found in by_length.items()
        }
        for name, by_length in values.items()
    }
