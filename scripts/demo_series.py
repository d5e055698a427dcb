"""A series of finetuned demo models: each measured alike, each result in a file of its own, all in one table.

An interrupted series goes on where it stopped: a result that is there is not made again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core.data.sample_set import SampleSet
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.devices import has_fast_bfloat16, peak_memory_gib
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.files import write_json
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.restoration import Restoration
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import train

EVALUATION = EvalConfig.quick(lengths=(512, 2048, 4096), num_documents=24)

_RETRIEVAL = {"passkey": "passkey", "needles": "unseen needles", "repeated_span": "repeated span"}


def run_missing(folder: Path, jobs: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Run the jobs that have no result in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        path = result_file(folder, name)
        if not path.is_file():
            print(f"running {name}", flush=True)
            write_json(path, job())


def result_file(folder: Path, name: str) -> Path:
    """Where the result of a job of this name is."""
    return folder / (name.replace(", ", "-").replace(" ", "-") + ".json")


def train_and_measure(
    model: PreTrainedModel,
    tokenizer: Any,
    samples: SampleSet,
    recipe: Recipe,
    *,
    collator: SampleCollator,
    seed: int,
    evaluation: EvalConfig,
    restoration: Restoration | None = None,
) -> dict[str, Any]:
    """Finetune a model in place and measure it.

    Returns:
        `num_steps`, `num_tokens`, `train_loss`, `train_s`, `memory_before_gib` and `peak_memory_gib` of this process
        before and after training, `after`.
    """
    device = next(model.parameters()).device
    memory_before = peak_memory_gib(device)
    with tempfile.TemporaryDirectory() as folder:
        training = train(
            model,
            samples,
            recipe,
            TrainSettings(seed=seed, mixed_precision=has_fast_bfloat16(device)),
            folder=Path(folder),
            collator=collator,
            restoration=restoration,
        )
    return {
        "num_steps": training.num_steps,
        "num_tokens": training.num_tokens,
        "train_loss": training.losses,
        "train_s": training.wall_s,
        "memory_before_gib": memory_before,
        "peak_memory_gib": peak_memory_gib(device),
        "after": evaluate(model, tokenizer, evaluation),
    }


def results_table(
    folder: Path, names: Sequence[str], columns: Mapping[str, Callable[[dict[str, Any]], str]] | None = None
) -> str:
    """The results that are there, as a markdown table.

    Args:
        columns: more columns, by their heads: what to show of a result.
    """
    found = {name: json.loads(path.read_text()) for name in names if (path := result_file(folder, name)).is_file()}
    if not found:
        return f"no results in {folder}"
    lengths = " / ".join(f"{length:,}" for length in next(iter(found.values()))["after"]["lengths"])
    heads = [
        "variant",
        f"perplexity {lengths}",
        f"loss, context {lengths}",
        f"passkey {lengths}",
        *list(_RETRIEVAL.values())[1:],
        *(columns or {}),
    ]
    rows = [heads, ["---"] * len(heads)]
    for name, result in found.items():
        shown = [show(result) for show in (columns or {}).values()]
        rows.append([name, *_measured(result["after"]), *shown])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _measured(after: dict[str, Any]) -> list[str]:
    cells = [
        [f"{entry['perplexity']:.2f}" for entry in after["perplexity"]],
        [f"{entry['nll']:.3f}" for entry in after["context_gain"]],
        *([f"{_mean(after[task], length):.0%}" for length in after["lengths"]] for task in _RETRIEVAL),
    ]
    return [" / ".join(cell) for cell in cells]


def _mean(entries: list[dict[str, Any]], length: int) -> float:
    found = [entry for entry in entries if entry["length"] == length]
    num_trials = sum(entry["num_trials"] for entry in found)
    return sum(entry["accuracy"] * entry["num_trials"] for entry in found) / num_trials
