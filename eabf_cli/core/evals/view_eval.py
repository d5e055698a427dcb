"""What a report shows of one model's evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from eabf_cli.core.evals.document_counts import documents_told
from eabf_cli.core.evals.numbers import between, decimal, perplexity, share
from eabf_cli.core.evals.retrieval import wilson_interval
from eabf_cli.core.evals.suite_results import suite_rows
from eabf_cli.core.evals.views import HeatMap, LineChart, Report, Series, Table

# Half the width of a 95 % interval, in standard errors.
_Z = 1.96
_RETRIEVAL_TASKS = ("passkey", "needles", "multi_key", "variable_tracking", "repeated_span")

Result = Mapping[str, Any]


def view_evaluation(result: Result) -> Report:
    """The report of an `evaluate` result."""
    window = result["original_max_position_embeddings"]
    return Report(
        kind="Evaluation",
        subject=str(result.get("model") or "Model"),
        headlines=[_effective_length(result)] if result.get("passkey") or result.get("needles") else [],
        facts=_facts(result),
        notes=list(result.get("notes") or []),
        tables=[
            table for table in (_losses_table(result), _retrieval_table(result), _suites_table(result)) if table.rows
        ],
        lines=[
            chart
            for chart in (
                position_chart({"perplexity": result}, window),
                length_chart({"perplexity": result}, window),
                _context_chart(result, window),
            )
            if chart.series
        ],
        maps=depth_maps(result),
    )


def position_chart(results: Mapping[str, Result], window: int) -> LineChart:
    """Perplexity by position, a line for each model; a point stands in the middle of its stretch."""
    series = []
    for name, result in results.items():
        entries = [entry for entry in result.get("perplexity_by_position") or [] if entry["perplexity"] is not None]
        if entries:
            x = [(entry["start"] + entry["end"]) / 2 for entry in entries]
            series.append(_perplexity_series(name, x, entries))
    return LineChart(
        title="Perplexity by position", x_title="position (tokens)", y_title="perplexity", series=series,
        window=window, is_log=True,
    )  # fmt: skip


def length_chart(results: Mapping[str, Result], window: int) -> LineChart:
    """Perplexity of the last tokens of a text by its length, a line for each model."""
    series = []
    for name, result in results.items():
        entries = [entry for entry in result.get("perplexity") or [] if entry["perplexity"] is not None]
        if entries:
            series.append(_perplexity_series(name, [entry["length"] for entry in entries], entries))
    return LineChart(
        title="Perplexity by length", x_title="length (tokens)", y_title="perplexity", series=series,
        window=window, is_log=True,
    )  # fmt: skip


def _perplexity_series(name: str, x: Sequence[float], entries: Sequence[Result]) -> Series:
    # The standard error is that of the loss, carried through the exponential.
    errors = [None if entry["stderr"] is None else _Z * entry["stderr"] / entry["perplexity"] for entry in entries]
    values = [entry["perplexity"] for entry in entries]
    return Series(
        name=name,
        x=x,
        y=values,
        # A loss is at least 0, so a perplexity is at least 1.
        low=[None if e is None else max(1.0, v * math.exp(-e)) for v, e in zip(values, errors, strict=True)],
        high=[None if e is None else v * math.exp(e) for v, e in zip(values, errors, strict=True)],
    )


def _context_chart(result: Result, window: int) -> LineChart:
    series = []
    for name, value, stderr in (("all tokens", "nll", "stderr"), ("key tokens", "key_nll", "key_stderr")):
        entries = [entry for entry in result.get("context_gain") or [] if entry.get(value) is not None]
        if entries:
            errors = [None if entry[stderr] is None else _Z * entry[stderr] for entry in entries]
            values = [entry[value] for entry in entries]
            series.append(
                Series(
                    name=name,
                    x=[entry["context"] for entry in entries],
                    y=values,
                    low=[None if e is None else max(0.0, v - e) for v, e in zip(values, errors, strict=True)],
                    high=[None if e is None else v + e for v, e in zip(values, errors, strict=True)],
                )
            )
    return LineChart(
        title="Loss on the same tokens by visible context", x_title="visible context (tokens)",
        y_title="loss (nats per token)", series=series, window=window,
    )  # fmt: skip


def depth_maps(result: Result, name: str = "") -> list[HeatMap]:
    """A map of right answers for every task whose needles stand at a depth."""
    entries = [entry for entry in result.get("grid") or result.get("passkey") or [] if entry["depth"] is not None]
    maps = []
    for task in dict.fromkeys(entry.get("task", "passkey") for entry in entries):
        mine = [entry for entry in entries if entry.get("task", "passkey") == task]
        lengths = sorted({entry["length"] for entry in mine})
        depths = sorted({entry["depth"] for entry in mine})
        found = {(entry["length"], entry["depth"]): entry["accuracy"] for entry in mine}
        maps.append(
            HeatMap(
                title=f"{name}: {_spoken(task)}" if name else _spoken(task),
                lengths=lengths,
                depths=depths,
                cells=[[found.get((length, depth)) for length in lengths] for depth in depths],
                num_trials=sum(round(entry["num_trials"]) for entry in mine),
            )
        )
    return maps


def _effective_length(result: Result) -> str:
    length, window = result.get("effective_length"), result["original_max_position_embeddings"]
    if length is None:
        return "No effective length: nothing was retrieved inside the pre-trained window, or not measured there."
    ending = "" if length > window else ", no longer than the pre-trained window"
    return f"Effective length: {length:,} tokens{ending}."


def _facts(result: Result) -> list[tuple[str, str]]:
    facts = [
        ("Method", str(result.get("method") or "none: the model as it stands")),
        ("Pre-trained window", f"{result['original_max_position_embeddings']:,} tokens"),
        ("Window", f"{result['max_position_embeddings']:,} tokens"),
    ]
    documents = documents_told(result)
    if documents:
        facts.append(("Documents", documents))
    for title, key in (("Text", "dataset"), ("Revision", "revision"), ("Device", "device")):
        if result.get(key):
            facts.append((title, str(result[key])))
    return facts


def _losses_table(result: Result) -> Table:
    perplexities = {entry["length"]: entry for entry in result.get("perplexity") or []}
    contexts = {entry["context"]: entry for entry in result.get("context_gain") or []}
    rows = []
    for length in sorted(perplexities.keys() | contexts.keys()):
        entry, context = perplexities.get(length, {}), contexts.get(length, {})
        rows.append(
            [
                f"{length:,}",
                perplexity(entry.get("perplexity")) + _error(entry.get("stderr"), 2),
                decimal(context.get("nll"), 3) + _error(context.get("stderr"), 3),
                decimal(context.get("key_nll"), 3) + _error(context.get("key_stderr"), 3),
            ]
        )
    return Table(
        title="Losses",
        columns=["tokens", "perplexity", "loss by context", "on key tokens"],
        rows=rows,
        note="With standard errors over documents. The loss by context is that on the same tokens at every length.",
    )


def _error(stderr: float | None, digits: int) -> str:
    return "" if stderr is None else f" ± {decimal(stderr, digits)}"


def _retrieval_table(result: Result) -> Table:
    rows = []
    for task in _RETRIEVAL_TASKS:
        entries = sorted(result.get(task) or [], key=lambda entry: entry["length"])
        for length, group in groupby(entries, key=lambda entry: entry["length"]):
            found = list(group)
            num_trials = sum(entry["num_trials"] for entry in found)
            rows.append([_spoken(task), f"{length:,}", _right_answers(found, num_trials), f"{num_trials:,.0f}"])
    return Table(
        title="Retrieval",
        columns=["task", "tokens", "right answers", "trials"],
        rows=rows,
        note="Over all depths and wordings, with 95 % intervals; of variables and spans the mean share that is right, "
        "the interval over prompts (variables) or spans.",
    )


def _suites_table(result: Result) -> Table:
    columns, *rows = suite_rows(result.get("suites") or [])
    return Table(
        title="Tasks of lm-eval",
        columns=columns,
        rows=rows,
        note="As lm-eval scores them, with its standard errors. Inputs that did not fit a length were cut.",
    )


def _right_answers(entries: Sequence[Result], num_trials: int) -> str:
    """Right answers of one task and length; an entry for each depth or wording."""
    accuracy = sum(entry["accuracy"] * entry["num_trials"] for entry in entries) / num_trials
    low, high = wilson_interval(accuracy * num_trials, num_trials)
    return share(accuracy) + between(low, high, 0, 100)


def _spoken(name: str) -> str:
    return name.replace("_", " ")
