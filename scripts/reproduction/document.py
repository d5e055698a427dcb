"""docs/reproduction.md, from the results that are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import (
    EXPERIMENTS,
    FIRST_SEEDS,
    NUM_SAMPLES,
    SEEDS,
    TARGET_WINDOW,
    WANTED_HALF_WIDTH,
    WINDOW,
    Cell,
    ablations,
    data_efficiency,
    extrapolation,
    larger_model,
)
from choosing import tuned_cells
from confirming import confirmation_cells
from estimates import Runs, level, read_runs
from extrapolation_section import extrapolation_findings, extrapolation_section
from formatting import bullets, counted, half_width, listed, paragraph, table
from further_sections import ablation_section, larger_model_section, tuned_findings, tuning_section
from pictures import write_picture
from running import read_cell
from samples_section import samples_findings, samples_runs, samples_section
from shared_tables import MEASUREMENTS
from variants import TUNED

from eabf_cli.core.data.records import open_records
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.files import write_text
from eabf_cli.core.finetune.recipe import recipe_for

DOCUMENT = Path("docs/reproduction.md")
PICTURE = Path("docs/images/reproduction.png")
PAPER = ("extrapolation", "data-efficiency", "tuning", "tuned", "ablations")
"""The experiments of `make reproduce`; `tuned` follows from the results of `tuning`."""

_NUM_PARAMETERS = 5_400_000


def write_document(results: Path, document: Path = DOCUMENT, picture: Path = PICTURE) -> None:
    """Write the document and its picture."""
    write_picture(read_runs(extrapolation(), results), picture)
    write_text(document, document_text(results))


def document_text(results: Path) -> str:
    """The document. Every number and verdict in it is computed from the results in the folder."""
    parts = [
        "# The paper in the small",
        paragraph(
            """Written by `make reproduce`, which computes every number and verdict from the runs in
            `docs/results/reproduction`."""
        ),
        _in_short(results),
        _what_was_run(results),
        _how_to_read(),
        extrapolation_section(results, f"images/{PICTURE.name}"),
        samples_section(results),
        tuning_section(results),
        ablation_section(results),
        larger_model_section(results),
        _precision(results),
        _how_to_go_on(),
    ]
    return "\n\n".join(parts) + "\n"


def _in_short(results: Path) -> str:
    return "\n\n".join(
        [
            "## In short",
            paragraph(
                """What becomes of the paper's claims on a model of 5 million parameters; [below](#how-to-read-it)
                stands what the verdicts mean. Extrapolation, after 100 samples at four windows (the paper's Table 5 is
                after 3,500):"""
            ),
            extrapolation_findings(results),
            paragraph("Data efficiency, in points of retrieval and in nats of loss by which the first is ahead:"),
            samples_findings(results),
            *tuned_findings(results),
        ]
    )


def experiment_cells(name: str, results: Path) -> list[Cell]:
    """The cells of an experiment; of those that depend on a choice, what is chosen already."""
    chosen = {"tuned": tuned_cells, "confirmation": confirmation_cells}
    return chosen[name](results) if name in chosen else EXPERIMENTS[name]()


def _what_was_run(folder: Path) -> str:
    names = (*PAPER, "larger-model")
    rows: list[tuple[str, ...]] = []
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        cells = {cell.key: cell for cell in experiment_cells(name, folder)}
        there = {key: result for key, cell in cells.items() if (result := read_cell(folder, cell)) is not None}
        num_planned = len(TUNED) * len(SEEDS) if name == "tuned" else len(cells)
        rows.append((name, str(num_planned), str(len(there)), str(num_planned - len(there))))
        found |= there
    hours = sum(result["wall_s"] for result in found.values()) / 3_600
    versions = sorted({result["torch"] for result in found.values()})
    machine = f"torch {listed(versions)}, {hours:.1f} hours of single-threaded runs in all" if found else "no run yet"
    pool = len(open_records(DEMO_DATASET, split="train").readers)
    seeds = ", ".join(map(str, SEEDS))
    recipe = recipe_for(_NUM_PARAMETERS, NUM_SAMPLES)
    sizes = [cell.num_samples for cell in data_efficiency()]
    fewest, most = min(sizes), max(sizes)
    later = listed([str(seed) for seed in SEEDS if seed not in FIRST_SEEDS])
    return "\n\n".join(
        [
            "## What was run",
            paragraph(
                f"""The demo model `{DEMO_MODEL}` (5.4 million parameters, window {WINDOW:,}) is extended to
                {TARGET_WINDOW:,} tokens, trained in full on samples of `{DEMO_DATASET}`, and measured as its bfloat16
                checkpoint would be loaded. The recipe is that of `eabf finetune`: AdamW, {recipe.epochs} epochs in
                batches of {recipe.batch_size}, learning rate {recipe.learning_rate:g} with a cosine schedule;
                {NUM_SAMPLES} samples are {recipe.num_steps(NUM_SAMPLES)} steps. {len(SEEDS)} seeds
                ({seeds}) draw the samples, their order and the prompts; all methods of a seed have
                the same ones. The results of the first {len(FIRST_SEEDS)} were read before the others were
                run. Perplexity is measured on the same 24 held-out documents throughout, on which nothing
                was chosen (test). Every fourth held-out document, with other prompts, is kept for choices (dev)."""
            ),
            paragraph(
                f"""There are {pool} training samples. Two draws of {NUM_SAMPLES} share about {
                    NUM_SAMPLES**2 / pool:.0f}; two of {most} share at least {
                    2 * most - pool
                }, so that the seeds say less about other
                samples than independent ones would. Seeds {later} were run by a later version of the package, which
                adds up the training loss in another order: with it, a run of {fewest} samples under seed
                {FIRST_SEEDS[0]} came to other losses by up to 0.0003 nats in the mean and 0.009 in a document. All
                methods of a seed were trained by one version."""
            ),
            paragraph(
                """This is not Llama-2-7B-chat and not LongBench. It can show whether an ordering of the methods is
                found on a small model, with error bars, which the paper does not give. It cannot show that a figure
                of the paper's is right or wrong: where an ordering is not found here, model size, window, data and
                tasks are all possible reasons."""
            ),
            paragraph(f"Runs: {machine}."),
            table(("Experiment", "runs", "there", "missing"), rows),
        ]
    )


def _how_to_read() -> str:
    return "\n\n".join(
        [
            "## How to read it",
            paragraph(
                """*Retrieval* is the share of unseen needles and repeated spans that are found, side by side (the
                [tasks of `eabf eval`](eval.md#what-is-measured)). *Perplexity* is that of the last tokens of a
                document's first so many; the *loss* is its logarithm, in nats per token. Behind a mean stands half
                the width of its 95 % interval over the trials (of a perplexity: the documents) for the models that
                were trained; then, in brackets, over seeds and trials together. Few seeds leave few degrees of
                freedom, so the second is wide even where the seeds agree. Documents differ far more than methods do:
                differences, which are paired by document and prompt, are much surer than the means."""
            ),
            paragraph(
                """Verdicts come from the paired bootstrap with Holm's correction over all that is judged together, at
                95 %:"""
            ),
            bullets(
                (
                    "**holds**, **better**, **rises** (**reversed**, **worse**, **falls**): told apart over seeds and "
                    "trials, so to be expected of other draws of samples, too;",
                    "holds here, better here, rises here (reversed here, worse here, falls here): told apart over the "
                    "trials, for the models that were trained; so few seeds cannot tell it of others;",
                    "open: not told apart; missing: no run is there yet. Fewer seeds than planned are counted.",
                )
            ),
            paragraph(
                """The p-value in brackets is the one that the verdict rests on, corrected. Losses are compared over 24
                documents, of which one may differ by ten times what the others do; a p-value just below 0.05 can be
                above it by another test of the same differences (a t-test, say)."""
            ),
        ]
    )


def _precision(folder: Path) -> str:
    """Which means are not known to 5 points."""
    cells = [*extrapolation(), *ablations(), *tuned_cells(folder), *larger_model()]
    groups: dict[str, Mapping[str, Runs]] = {
        "": read_runs({cell.key: cell for cell in cells}.values(), folder),
        **{f" with {size} samples": runs for size, runs in samples_runs(folder).items() if size != NUM_SAMPLES},
    }
    num_means, wide = 0, []
    for suffix, group in groups.items():
        for name, runs in group.items():
            for measurement in ("passkey", "needles", "repeated_span", "multi_key"):
                for length in sorted({n for s in runs.scores.values() for n in s.values.get(measurement, ())}):
                    found = level(runs, measurement, length)
                    width = None if found is None else half_width(found)
                    if width is None:
                        continue
                    num_means += 1
                    if width > WANTED_HALF_WIDTH:
                        num_seeds = len(runs.scores)
                        seeds = "" if num_seeds == runs.num_planned else f", {num_seeds} of {runs.num_planned} seeds"
                        what = f"{MEASUREMENTS[measurement].lower()} at {length:,}"
                        wide.append(f"`{name}`{suffix}, {what} ({100 * width:.1f}{seeds})")
    text = f"""Wanted are 5 points: half the width of the 95 % interval over the trials of all seeds, clustered by
    prompt. Of {counted(num_means, "share")} of single tasks, whether they have a table of their own or are part of the
    retrieval, {num_means - len(wide)} are known so exactly."""
    parts = ["## How exactly the shares are known", paragraph(text)]
    if wide:
        parts += ["Not these (half the width in points):", "\n".join(f"- {line}" for line in wide)]
    return "\n\n".join(parts)


def _how_to_go_on() -> str:
    commands = (
        "make reproduce                                          # what is missing, then this page",
        "make reproduce-larger                                   # SmolLM2-135M-Instruct, then this page",
        "make study                                              # frequencies x scale x loss, then docs/study.md",
        "python scripts/reproduction --only extrapolation        # one experiment",
        "python scripts/reproduction --report                    # this page alone, from what is there",
    )
    return "\n\n".join(
        [
            "## How to go on",
            "```sh\n" + "\n".join(commands) + "\n```",
            paragraph(
                """Each run is a file in `docs/results/reproduction` that keeps the score of every document and trial;
                an interrupted series goes on where it stopped. [reproducing.md](reproducing.md) has the commands for
                Llama-2-7B and LongBench on a GPU."""
            ),
        ]
    )
