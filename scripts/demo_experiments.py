"""What finetuning on 100 samples of demo-long does to eabf-tiny under other settings than the defaults.

    python scripts/demo_experiments.py eabf-runs/experiments          # run what is missing, then print the table
    python scripts/demo_experiments.py eabf-runs/experiments --table  # only print it

Every variant trains the same samples from the same weights and is measured on the same prompts and documents.
A variant's result is a JSON file of its own, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import set_seed

from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
from eabf_cli.core.data import DataConfig, SampleCollator, load_samples
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.files import write_json
from eabf_cli.core.recipe import recipe_for
from eabf_cli.core.training import train

EVALUATION = EvalConfig.quick(lengths=(512, 2048, 4096), num_documents=24)

# name -> (method and its numbers, recipe changes)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eabf": ({}, {}),
    "eabf, lr 1e-3": ({}, {"learning_rate": 1e-3}),
    "eabf, lr 1e-4": ({}, {"learning_rate": 1e-4}),
    "eabf, base auto": ({"rope_theta": "auto"}, {}),
    "eabf, all layers scaled": ({"unscaled_layers": ()}, {}),
    "abf": ({"method": "abf"}, {}),
    "yarn": ({"method": "yarn"}, {}),
    "native": ({"method": "native"}, {}),
    "eabf, batches of 2": ({}, {"batch_size": 2}),
}


def run_variant(
    model_name: str, dataset: str, method: dict[str, Any], changes: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Finetune and measure one variant."""
    tokenizer = load_tokenizer(model_name)
    samples = load_samples(DataConfig(dataset=dataset, seed=seed), tokenizer)
    set_seed(seed)
    model = load_model(model_name, dtype="float32")
    report = apply_method(model, RopeScalingConfig(**({"method": "eabf", "factor": 4.0} | method)))
    recipe = recipe_for(model.num_parameters(), len(samples), **changes)
    with tempfile.TemporaryDirectory() as folder:
        training = train(
            model,
            samples,
            recipe,
            folder=Path(folder),
            collator=SampleCollator.from_tokenizer(tokenizer),
            seed=seed,
            mixed_precision=False,
            keep_checkpoints=False,
        )
    return {
        "rope_theta": report.rope_theta,
        "train_loss": training["train_loss"],
        "train_s": training["wall_s"],
        "after": evaluate(model, tokenizer, EVALUATION),
    }


def table(folder: Path) -> str:
    """The variants that were run, as a markdown table."""
    lines = [
        "| variant | perplexity 512 / 2,048 / 4,096 | loss, context 512 / 2,048 / 4,096 "
        "| passkey 512 / 2,048 / 4,096 | unseen needles | repeated span |",
        "|---|---|---|---|---|---|",
    ]
    for name in ["original", *VARIANTS]:
        path = folder / _file_name(name)
        if not path.is_file():
            continue
        after = json.loads(path.read_text())["after"]
        cells = [
            [f"{entry['perplexity']:.2f}" for entry in after["perplexity"]],
            [f"{entry['nll']:.3f}" for entry in after["context_gain"]],
            *([f"{_mean(after[key], length):.0%}" for length in after["lengths"]] for key in _RETRIEVAL),
        ]
        lines.append(f"| {name} | " + " | ".join(" / ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


_RETRIEVAL = ("passkey", "needles", "repeated_span")


def _mean(entries: list[dict[str, Any]], length: int) -> float:
    found = [entry for entry in entries if entry["length"] == length]
    num_trials = sum(entry["num_trials"] for entry in found)
    return sum(entry["accuracy"] * entry["num_trials"] for entry in found) / num_trials


def _file_name(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-") + ".json"


def main() -> None:
    """Run the variants that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results are kept")
    parser.add_argument("--model", default="eabf-tiny")
    parser.add_argument("--dataset", default="demo-long")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        original = arguments.folder / _file_name("original")
        if not original.is_file():
            model, tokenizer = load_model(arguments.model, dtype="float32"), load_tokenizer(arguments.model)
            write_json(original, {"after": evaluate(model, tokenizer, EVALUATION)})
        for name in arguments.only:
            path = arguments.folder / _file_name(name)
            if not path.is_file():
                print(f"running {name}", flush=True)
                write_json(path, run_variant(arguments.model, arguments.dataset, *VARIANTS[name], arguments.seed))
    print(table(arguments.folder))


if __name__ == "__main__":
    main()
