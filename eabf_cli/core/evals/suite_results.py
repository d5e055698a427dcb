"""What lm-eval measured, in the form of our results, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eabf_cli.core.evals.suite_model import InputCount

Entry = dict[str, Any]
"""One task or group at one length; `suite_entries` says what it holds."""


def suite_entries(
    suite: str, length: int, results: Mapping[str, Any], input_counts: Mapping[str, InputCount]
) -> list[Entry]:
    """An entry for each task and each group of tasks that has a score of its own.

    Args:
        suite: the name that was asked for: a task or a group.
        length: window length in tokens.
        results: what `lm_eval.evaluate` returned.
        input_counts: by task.

    Returns:
        entries with `suite`, `task`, `length`; `metrics`, a list of `{metric, filter, value, stderr}` as lm-eval
        has them (a score by length, as RULER's, is called `score`; stderr None: not known); `num_samples`;
        `num_inputs`, `num_cut`, `max_input_tokens` (`InputCount`); `num_fewshot`, `version` of the task; `same_as`,
        None or a shorter length at which the same inputs were run.
    """
    entries = []
    for name, measured in results["results"].items():
        metrics = _metrics(measured, length)
        if not metrics:
            continue
        counts = [input_counts[task] for task in _leaves(name, results["group_subtasks"]) if task in input_counts]
        entries.append(
            {
                "suite": suite,
                "task": name,
                "length": length,
                "metrics": metrics,
                "num_samples": measured["sample_len"],
                "num_inputs": sum(count.num_inputs for count in counts),
                "num_cut": sum(count.num_cut for count in counts),
                "max_input_tokens": max((count.max_tokens for count in counts), default=0),
                "num_fewshot": results["n-shot"].get(name),
                "version": str(results["versions"].get(name)),
                "same_as": None,
            }
        )
    return entries


def average_entry(suite: str, length: int, entries: Iterable[Entry], tasks: Sequence[str]) -> Entry | None:
    """The mean `score` over `tasks` at one length, each counted once; None unless all were measured."""
    found = {entry["task"]: entry for entry in entries if entry["length"] == length and entry["suite"] in tasks}
    if any(task not in found for task in tasks):
        return None
    chosen = [found[task] for task in tasks]
    scores = [metric for entry in chosen for metric in entry["metrics"] if metric["metric"] == "score"]
    stderrs = [score["stderr"] for score in scores]
    known = all(stderr is not None for stderr in stderrs)
    # The tasks' samples are independent.
    stderr = math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(scores) if known else None
    value = sum(score["value"] for score in scores) / len(scores)
    return {
        "suite": suite,
        "task": suite,
        "length": length,
        "metrics": [{"metric": "score", "filter": "none", "value": value, "stderr": stderr}],
        "num_samples": sum(entry["num_samples"] for entry in chosen),
        "num_inputs": sum(entry["num_inputs"] for entry in chosen),
        "num_cut": sum(entry["num_cut"] for entry in chosen),
        "max_input_tokens": max(entry["max_input_tokens"] for entry in chosen),
        "num_fewshot": None,
        "version": None,
        "same_as": None,
    }


def suite_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """Entries as a table: a header, then a row per metric with a cell per length; with standard errors and cut inputs.

    Of a group with a score of its own, the tasks below it are left out.
    """
    groups = {entry["suite"] for entry in entries if entry["task"] == entry["suite"]}
    shown = [entry for entry in entries if entry["suite"] not in groups or entry["task"] == entry["suite"]]
    lengths = sorted({entry["length"] for entry in shown})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for entry in shown:
        for metric in entry["metrics"]:
            name = metric["metric"] if metric["filter"] == "none" else f"{metric['metric']} ({metric['filter']})"
            cells.setdefault((entry["task"], name), {})[entry["length"]] = _format_value(metric)
        if any(other["num_cut"] for other in shown if other["task"] == entry["task"]):
            cut = f"{entry['num_cut']:,} of {entry['num_inputs']:,}"
            cells.setdefault((entry["task"], "inputs cut"), {})[entry["length"]] = cut
    header = ["task", "metric", *(f"{length:,}" for length in lengths)]
    return [header, *([*names, *(values.get(length, "-") for length in lengths)] for names, values in cells.items())]


def format_suites(entries: Sequence[Entry]) -> str:
    """`suite_rows` aligned, with the name of a task in its first row."""
    rows = suite_rows(entries)
    return _align([rows[0]] + [["" if row[0] == before[0] else row[0], *row[1:]] for before, row in pairwise(rows)])


def _metrics(measured: Mapping[str, Any], length: int) -> list[dict[str, Any]]:
    metrics = []
    for key, value in measured.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if metric.isdigit():
            # RULER has a metric for each of its lengths, -1 at all that were not run.
            if metric != str(length):
                continue
            metric = "score"
        stderr = measured.get(key.replace(",", "_stderr,", 1))
        metrics.append({"metric": metric, "filter": filter_name, "value": _number(value), "stderr": _number(stderr)})
    return metrics


def _number(value: Any) -> float | None:
    """A finite number, which JSON can hold; lm-eval writes "N/A" for an error that it does not know."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    return float(value)


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group; a task itself."""
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


def _format_value(metric: Mapping[str, Any]) -> str:
    value, stderr = metric["value"], metric["stderr"]
    if value is None:
        return "-"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ±{stderr:.4f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
