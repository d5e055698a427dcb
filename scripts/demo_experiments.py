"""What finetuning on 100 samples of demo-long does to eabf-tiny under other settings than the defaults.

    python scripts/demo_experiments.py eabf-runs/experiments          # run what is missing, then print the table
    python scripts/demo_experiments.py eabf-runs/experiments --table  # only print it

Every variant trains the same samples from the same weights and is measured on the same prompts and documents.
A variant's result is a JSON file of its own, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from demo_series import EVALUATION, results_table, run_missing, train_and_measure
from transformers import set_seed

from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
from eabf_cli.core.data.samples import DataConfig, SampleCollator, load_samples
from eabf_cli.core.evaluation import evaluate
from eabf_cli.core.finetune.recipe import recipe_for

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
    collator = SampleCollator.from_tokenizer(tokenizer)
    return {
        "rope_theta": report.rope_theta,
        **train_and_measure(model, tokenizer, samples, recipe, collator=collator, seed=seed, evaluation=EVALUATION),
    }


def measure_original(model_name: str) -> dict[str, Any]:
    """Measure the model as it is."""
    return {"after": evaluate(load_model(model_name, dtype="float32"), load_tokenizer(model_name), EVALUATION)}


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
    if not arguments.table:
        jobs = {
            name: partial(run_variant, arguments.model, arguments.dataset, *VARIANTS[name], arguments.seed)
            for name in arguments.only
        }
        run_missing(arguments.folder, {"original": partial(measure_original, arguments.model)} | jobs)
    print(results_table(arguments.folder, ["original", *VARIANTS]))


if __name__ == "__main__":
    main()
