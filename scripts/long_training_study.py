"""Full-length finetuning of eabf-tiny against PoSE, and with a restoration loss.

    python scripts/long_training_study.py eabf-runs/long-training --seeds 42 43   # run what is missing, show all
    python scripts/long_training_study.py eabf-runs/long-training --table         # only show

Every variant starts from the same weights and trains 100 samples of demo-long. A run is a process of its own,
because its peak memory is a figure, and a JSON file of its own, so that an interrupted series goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo_series import EVALUATION, results_table, run_missing, train_and_measure
from transformers import set_seed

from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
from eabf_cli.core.data.samples import DataConfig, SampleCollator, load_samples
from eabf_cli.core.evaluation import evaluate
from eabf_cli.core.finetune.pose import PoseCollator, pose_samples
from eabf_cli.core.finetune.recipe import recipe_for
from eabf_cli.core.finetune.restoration import FrozenTeacher, Restoration
from eabf_cli.core.finetune.settings import RestorationConfig

MODEL = "eabf-tiny"
EPOCHS = 2
BATCH_SIZE = 4
ROWS_PER_SAMPLE = 4
"""Rows of the original window that a sample of demo-long fills."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a run trains.

    Attributes:
        pose_rows: PoSE rows per sample and epoch; None trains whole samples.
        batch_size: rows of an optimizer step.
        restoration: the restoration loss, if any.
    """

    pose_rows: int | None = None
    batch_size: int = BATCH_SIZE
    restoration: RestorationConfig | None = None


VARIANTS = {
    "full": Variant(),
    # As many steps as full, a quarter of its tokens.
    "pose, same steps": Variant(pose_rows=1),
    "pose, same steps and tokens": Variant(pose_rows=ROWS_PER_SAMPLE, batch_size=ROWS_PER_SAMPLE * BATCH_SIZE),
    # Four times the steps.
    "pose, same tokens": Variant(pose_rows=ROWS_PER_SAMPLE),
    "full, restoration": Variant(restoration=RestorationConfig()),
    "full, restoration on every row": Variant(restoration=RestorationConfig(share=1.0)),
    "pose, same steps and tokens, restoration": Variant(
        pose_rows=ROWS_PER_SAMPLE, batch_size=ROWS_PER_SAMPLE * BATCH_SIZE, restoration=RestorationConfig()
    ),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all runs share."""

    num_samples: int
    lengths: tuple[int, ...]

    def measure(self, *, is_patched: bool) -> dict[str, Any]:
        """Measure the model untrained."""
        model = load_model(MODEL, dtype="float32")
        if is_patched:
            apply_method(model, RopeScalingConfig(method="eabf", factor=4.0))
        return {"after": evaluate(model, load_tokenizer(MODEL), EVALUATION.replace(lengths=self.lengths))}

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Finetune and measure one variant."""
        tokenizer = load_tokenizer(MODEL)
        samples = load_samples(DataConfig(num_samples=self.num_samples, seed=seed), tokenizer)
        set_seed(seed)
        model = load_model(MODEL, dtype="float32")
        teacher = FrozenTeacher(model, torch.float32) if variant.restoration is not None else None
        report = apply_method(model, RopeScalingConfig(method="eabf", factor=4.0))
        common = {"window": report.original_max_position_embeddings, "bos_token_id": tokenizer.bos_token_id}
        epochs, collator = EPOCHS, SampleCollator.from_tokenizer(tokenizer)
        if variant.pose_rows is not None:
            target = report.max_position_embeddings
            samples = pose_samples(
                samples, **common, target=target, seed=seed, rows_per_sample=variant.pose_rows, epochs=EPOCHS
            )
            epochs, collator = 1, PoseCollator.from_tokenizer(tokenizer)
        recipe = recipe_for(model.num_parameters(), len(samples), epochs=epochs, batch_size=variant.batch_size)
        restoration = None
        if variant.restoration is not None and teacher is not None:
            restoration = Restoration(variant.restoration, model=model, teacher=teacher, **common, seed=seed)
        result = train_and_measure(
            model,
            tokenizer,
            samples,
            recipe,
            collator=collator,
            seed=seed,
            evaluation=EVALUATION.replace(lengths=self.lengths),
            restoration=restoration,
        )
        return {"variant": asdict(variant), "seed": seed, **result}


def in_own_process(work: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Call a function in a new process, whose peak memory is that of this work alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(work, *arguments, **options).result()


def _jobs(study: Study, only: Sequence[str], seeds: Sequence[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    jobs = {
        "original": partial(in_own_process, study.measure, is_patched=False),
        "patched": partial(in_own_process, study.measure, is_patched=True),
    }
    # A whole comparison with the first seed before the second begins.
    return jobs | {
        f"{name}, seed {seed}": partial(in_own_process, study.run, VARIANTS[name], seed)
        for seed in seeds
        for name in only
    }


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "steps": lambda result: f"{result['num_steps']}" if "num_steps" in result else "",
    "tokens": lambda result: f"{result['num_tokens']:,}" if "num_tokens" in result else "",
    "training": lambda result: f"{result['train_s']:.0f} s" if "train_s" in result else "",
    "peak memory (before training)": lambda result: (
        f"{result['peak_memory_gib']:.2f} ({result['memory_before_gib']:.2f}) GiB" if "train_s" in result else ""
    ),
}


def main() -> None:
    """Run what has no result yet, then show everything that has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--samples", type=int, default=100, help="fewer for a trial of the script")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(EVALUATION.lengths or ()))
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    arguments = parser.parse_args()
    study = Study(num_samples=arguments.samples, lengths=tuple(arguments.lengths))
    if not arguments.table:
        run_missing(arguments.folder, _jobs(study, arguments.only, arguments.seeds))
    print(results_table(arguments.folder, list(_jobs(study, list(VARIANTS), arguments.seeds)), _COLUMNS))


if __name__ == "__main__":
    main()
