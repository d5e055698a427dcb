"""Results in the form of `compare`, `verdict` and `run_evaluation`, made up, for tests of what reports show of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from eabf_cli.core.evals.comparisons import (
    Bootstrap,
    UnitScores,
    difference_entries,
    interval_entries,
    summary_sentences,
)
from eabf_cli.core.evals.grid import needle_grid
from eabf_cli.core.evals.judgement import ALTERNATIVES, judge
from eabf_cli.core.evals.retrieval import mean_share_of
from eabf_cli.core.evals.verdict_rows import Stretch
from eabf_cli.core.evals.verdict_settings import VerdictConfig

WINDOW, TARGET = 512, 2048
LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.5, 1.0)


def _answers(rng: np.random.Generator) -> dict[str, Any]:
    return {"accuracy": float(rng.integers(0, 11)) / 10, "lower_bound": 0.0, "upper_bound": 1.0, "num_trials": 10}


def made_up_evaluation(*, model: str = "a/model", seed: int = 0, loss: float = 3.0) -> dict[str, Any]:
    """One model's evaluation; perplexity at the longest length was not measured."""
    rng = np.random.default_rng(seed)
    perplexities = [*np.exp(rng.normal(loss, 0.3, len(LENGTHS) - 1)).tolist(), None]
    answers: dict[str, Any] = {
        task: [{"length": length, name: value} | _answers(rng) for length in LENGTHS for value in values]
        for task, name, values in (
            ("passkey", "depth", DEPTHS),
            ("multi_key", "depth", DEPTHS),
            ("needles", "template", ("one", "two")),
        )
    }
    for task in ("variable_tracking", "repeated_span"):
        answers[task] = [
            {"length": length} | mean_share_of((rng.integers(0, 5, size=10) / 4).tolist()) for length in LENGTHS
        ]
    return {
        "model": model,
        "method": "eabf",
        "revision": None,
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET,
        "dataset": "some texts",
        "device": "cpu",
        "effective_length": 1024,
        "notes": ["perplexity at 2,048: no document is that long"],
        "perplexity": [
            {"length": length, "perplexity": value, "stderr": None if value is None else 0.05 * value}
            | {"num_documents": 0 if value is None else 12}
            for length, value in zip(LENGTHS, perplexities, strict=True)
        ],
        "context_gain": [
            {"context": length, "nll": loss - 0.1 * n, "stderr": 0.05, "key_nll": 2.0 - 0.2 * n, "key_stderr": None}
            | {"num_documents": 12}
            for n, length in enumerate(LENGTHS)
        ],
        "perplexity_by_position": [
            {"start": max(1, start), "end": start + 128, "perplexity": 20.0 + start / 100, "stderr": 1.5}
            | {"num_documents": 12 if start < WINDOW else 4}
            for start in range(0, TARGET, 128)
        ],
        "grid": needle_grid(answers),
        **answers,
    }


def made_up_comparison(names: tuple[str, ...] = ("linear", "yarn", "eabf"), **changes: Any) -> dict[str, Any]:
    """Methods beside the original, each after training under two seeds."""
    bootstrap = Bootstrap(seed=0, num_resamples=500)
    scores = {
        name: [_scores(10 * number + seed, 3.0 + 0.2 * number) for seed in range(1 if name == "original" else 2)]
        for number, name in enumerate(("original", *names))
    }
    differences = difference_entries(scores, names[-1], bootstrap, window=WINDOW, target_window=TARGET)
    compared = {}
    for number, name in enumerate(scores):
        compared[name] = made_up_evaluation(seed=number, loss=3.0 + 0.2 * number) | {
            "title": f"what {name} is",
            "kind": "original" if name == "original" else "method",
            "method": None if name == "original" else name,
            "rope_theta": None if name == "original" else 500_000.0,
            "intervals": interval_entries(scores[name], bootstrap),
        }
    return {
        "model": "a/model",
        "revision": None,
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET,
        "factor": 4.0,
        "lengths": list(LENGTHS),
        "methods": list(names),
        "reference": names[-1],
        "confidence": 0.95,
        "dataset": "some texts",
        "finetuned": True,
        "seeds": [42, 43],
        "train_dataset": "demo-long",
        "num_samples": 100,
        "too_long": "truncate",
        "notes": [],
        "compare": compared,
        "differences": differences,
        "summary": summary_sentences(differences),
        **changes,
    }


def _scores(seed: int, loss: float) -> UnitScores:
    rng = np.random.default_rng(seed)
    return UnitScores(
        {
            "perplexity": {length: rng.normal(loss, 0.3, 12).tolist() for length in LENGTHS},
            "context_gain": {length: rng.normal(loss, 0.3, 12).tolist() for length in LENGTHS},
            "passkey": {length: rng.integers(0, 2, 20).astype(float).tolist() for length in LENGTHS},
        }
    )


def made_up_verdict(*, lead: float = 0.3, model: str = "a/model") -> dict[str, Any]:
    """An extended model that leads every alternative by so much."""
    rng = np.random.default_rng(0)
    stretches = [
        Stretch(document=number // 3, piece=0, tokens=range(900), piece_start=0, start=600, end=664)
        for number in range(30)
    ]
    losses = {"extended": rng.normal(3, 0.4, 30)}
    losses |= {name: losses["extended"] + lead + rng.normal(0, 0.1, 30) for name in ALTERNATIVES}
    losses["extended_last_window"] = losses["last_window"] + 0.02
    titles = {name: f"title of {name}" for name in losses}
    return {
        "model": model,
        "original": "the/original",
        "original_reason": "named by eabf_run.json",
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET,
        "dataset": "my documents",
        "notes": ["1 of 11 documents are left out"],
        "verdict": judge(
            {name: values.tolist() for name, values in losses.items()}, stretches, titles, VerdictConfig()
        ),
    }
