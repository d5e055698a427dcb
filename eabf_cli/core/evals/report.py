"""A result on disk and on the terminal: JSON, Markdown, pictures and one page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eabf_cli.core.evals.markdown import render_markdown, render_text
from eabf_cli.core.evals.page import render_page
from eabf_cli.core.evals.plots import write_plots
from eabf_cli.core.evals.view_compare import view_comparison
from eabf_cli.core.evals.view_eval import view_evaluation
from eabf_cli.core.evals.view_verdict import view_verdict
from eabf_cli.core.evals.views import Report
from eabf_cli.core.files import whole_folder, write_json, write_text
from eabf_cli.core.run_record import run_record, write_run_record

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE = "eval.json", "report.md", "report.html"


def view(result: Mapping[str, Any]) -> Report:
    """What a report shows of a result: of a comparison, a verdict or one model's evaluation."""
    if "compare" in result:
        return view_comparison(result)
    if "verdict" in result:
        return view_verdict(result)
    return view_evaluation(result)


def result_text(result: Mapping[str, Any]) -> str:
    """A comparison or a verdict as the terminal shows it, also one that was only planned (`--dry-run`)."""
    if "compare" in result or "verdict" in result:
        output = result.get("output")
        return render_text(view(result)) + ("" if output is None else f"\n\nWritten to {output}")
    return "\n".join([*_planned(result), *result["notes"], "Nothing was measured (--dry-run)."])


def _planned(result: Mapping[str, Any]) -> Iterator[str]:
    """What would be compared."""
    windows = f"from {result['original_max_position_embeddings']:,} to {result['max_position_embeddings']:,} tokens"
    if "methods" not in result:
        yield (
            f"{result['model']} ({windows}) against {result['original']} ({result['original_reason']}): "
            f"{result['num_stretches']:,} stretches of {result['num_documents']:,} documents in {result['dataset']}"
        )
        return
    lengths = ", ".join(f"{length:,}" for length in result["lengths"])
    num_seeds = len(result["seeds"])
    trained = f", finetuned under {num_seeds} seed{'' if num_seeds == 1 else 's'}" if result["finetuned"] else ""
    yield f"{result['model']} ({windows}) under {', '.join(result['methods'])}{trained}, at {lengths} tokens"
    if "training" in result:
        run = result["training"]
        # Beside the methods, the two controls.
        num_runs = num_seeds * (len(result["methods"]) + 2)
        yield (
            f"Each of {num_runs:,} runs: {run['num_samples']:,} samples, {run['num_tokens']:,} tokens, "
            f"{run['num_steps']:,} steps, learning rate {run['recipe']['learning_rate']:g}, {run['tuning']}"
        )
    yield f"Measuring takes {needs_text(result)}{', training comes on top' if 'training' in result else ''}"


def needs_text(planned: Mapping[str, Any]) -> str:
    """Memory and time of a dry run (`memory`, `available_gib`, `device`, `expected_s`) in words."""
    seconds = planned["expected_s"]
    return (
        f"about {planned['memory']['total_gib']:.1f} GiB on {planned['device']} "
        f"({planned['available_gib']:.1f} GiB available)"
        + ("" if seconds is None else f", roughly {math.ceil(seconds / 60):,} min")
    )


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write `report.md`, `report.html` and the pictures into a folder that exists."""
    report = view(result)
    pictures = write_plots(report, folder)
    write_text(folder / MARKDOWN_FILE, render_markdown(report, pictures))
    write_text(folder / PAGE_FILE, render_page(report))


def write_files(result: dict[str, Any], config: Any, folder: Path) -> None:
    """Write a result, its report and last its run record into a folder that exists.

    Args:
        config: the dataclass that it was asked for with.
    """
    write_json(folder / RESULT_FILE, result)
    write_report(result, folder)
    arguments = json.loads(json.dumps(asdict(config), default=str))
    # The texts themselves would be the larger part of the record.
    arguments["run"]["evaluation"]["documents"] = None
    summary = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    write_run_record(folder, run_record("eval", arguments, summary))


def write_result(result: dict[str, Any], config: Any, output: Path, *, overwrite: bool) -> None:
    """Write the folder of a result whole or not at all; see `write_files`."""
    with whole_folder(output, overwrite=overwrite) as folder:
        write_files(result, config, folder)
