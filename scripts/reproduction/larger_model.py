"""One method on SmolLM2-135M-Instruct at twice its window, without training."""

from __future__ import annotations

import time
from typing import Any

from books import book_stretches
from cells import Cell
from measuring import record, rounded

from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
from eabf_cli.core.evals.scored_model import ScoredModel
from eabf_cli.core.evals.settings import EvalConfig
from eabf_cli.core.evaluation import evaluate_scores
from eabf_cli.core.summarize.default_model import default_model

# A text of 16,384 tokens takes this model minutes, and further questions to one text next to nothing.
_SIZES: dict[str, Any] = {
    "tasks": ("perplexity_by_position", "multi_key"),
    "num_multi_key_texts": 2,
    "depths": tuple(step / 9 for step in range(10)),
}


def measure_larger_model(cell: Cell) -> dict[str, Any]:
    """Measure a cell of the larger model.

    Returns:
        the keys of `measure_cell`; `scores` with `positions` beside them, from (first index, index behind the last) as
        text to the documents' losses.
    """
    started = time.perf_counter()
    name = default_model()
    model = load_model(name, dtype="float32")
    report = None
    if cell.variant is not None:
        report = apply_method(
            model,
            RopeScalingConfig(
                method=cell.variant.method, factor=cell.variant.factor, rope_theta=cell.variant.rope_theta
            ),
        )
    config = EvalConfig(lengths=cell.lengths, documents=book_stretches(cell.seed), seed=cell.seed, **_SIZES)
    measured = evaluate_scores(model, load_tokenizer(name), config)
    scores = ScoredModel.of(measured, has_key_tokens=False).to_dict()
    positions = {f"{start}-{end}": losses for (start, end), losses in measured.positions.items()}
    found = {
        "scores": {
            "values": rounded(scores["values"]),
            "clusters": scores["clusters"],
            "positions": rounded({"positions": positions})["positions"],
        },
        "effective_length": measured.result["effective_length"],
    }
    return record(cell, report, found, started=started)
