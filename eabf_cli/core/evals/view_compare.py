"""What a report shows of a comparison of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eabf_cli.core.evals.comparisons import INSIDE, LOSSES, TITLES
from eabf_cli.core.evals.document_counts import documents_told
from eabf_cli.core.evals.numbers import MISSING, between, decimal, p_value, perplexity, share
from eabf_cli.core.evals.view_eval import depth_maps, position_chart
from eabf_cli.core.evals.views import IntervalChart, LineChart, Report, Series, Table

Result = Mapping[str, Any]

_MAP_TASK = "passkey"


def view_comparison(result: Result) -> Report:
    """The report of a `compare` result."""
    window = result["original_max_position_embeddings"]
    compared = result["compare"]
    measurements = list(dict.fromkeys(entry["measurement"] for entry in compared[result["reference"]]["intervals"]))
    charts = [position_chart(compared, window)]
    charts += [_chart(result, measurement, window) for measurement in measurements]
    return Report(
        kind="Comparison of methods" + (" after finetuning" if result["finetuned"] else " without training"),
        subject=str(result["model"]),
        headlines=result["summary"],
        facts=_facts(result),
        notes=_notes(result),
        tables=[
            _contenders(result),
            *(_measurement_table(result, measurement) for measurement in measurements),
            *_difference_tables(result),
        ],
        lines=[chart for chart in charts if chart.series],
        maps=[
            found
            for name, entry in compared.items()
            for found in depth_maps(entry, name)
            if found.title.endswith(_MAP_TASK)
        ],
        intervals=_difference_charts(result),
    )


def _facts(result: Result) -> list[tuple[str, str]]:
    facts = [
        ("Pre-trained window", f"{result['original_max_position_embeddings']:,} tokens"),
        ("Extended window", f"{result['max_position_embeddings']:,} tokens (factor {result['factor']:g})"),
        ("Compared with", str(result["reference"])),
        ("Text", str(result["dataset"])),
    ]
    documents = documents_told(result["compare"][result["reference"]])
    if documents:
        facts.append(("Documents", documents))
    if result["finetuned"]:
        facts += [
            ("Training", f"{result['num_samples']} samples of {result['train_dataset']}{_cut(result)}"),
            ("Seeds", ", ".join(map(str, result["seeds"]))),
        ]
    return facts


def _cut(result: Result) -> str:
    """What was done with samples longer than the target window, where the result says it."""
    too_long = result.get("too_long", "error")
    return "" if too_long == "error" else f" (longer ones: {too_long})"


def _notes(result: Result) -> list[str]:
    notes = list(result.get("notes") or [])
    for entry in result["compare"].values():
        notes += [note for note in entry.get("notes") or [] if note not in notes]
    if result["finetuned"] and len(result["seeds"]) == 1:
        notes.append("one training run each: the intervals say nothing about other samples (--seeds draws more)")
    return notes


def _contenders(result: Result) -> Table:
    rows = []
    for name, entry in result["compare"].items():
        theta = MISSING if entry["rope_theta"] is None else f"{entry['rope_theta']:,.0f}"
        length = entry.get("effective_length")
        rows.append([name, entry["title"], theta, MISSING if length is None else f"{length:,}"])
    return Table(
        title="What is compared",
        columns=["name", "what it is", "base frequency", "effective length"],
        rows=rows,
        note="The effective length is the longest whose retrieval is, with confidence, at least 90 % of that inside "
        "the original window; lengths inside it need no proof.",
    )


def _measurement_table(result: Result, measurement: str) -> Table:
    entries = {
        (name, entry["length"]): entry
        for name, contender in result["compare"].items()
        for entry in contender["intervals"]
        if entry["measurement"] == measurement
    }
    lengths = sorted({length for _, length in entries})
    rows = [
        [name, *(_cell(measurement, entries.get((name, length))) for length in lengths)] for name in result["compare"]
    ]
    return Table(
        title=_titled(measurement),
        columns=["tokens", *(f"{length:,}" for length in lengths)],
        rows=rows,
        note=_measurement_note(measurement, result["confidence"]),
    )


def _measurement_note(measurement: str, confidence: float) -> str:
    interval = f"With {share(confidence)} intervals from the bootstrap"
    if measurement == "perplexity":
        return f"Of the last tokens of texts of each length. {interval}."
    if measurement == "context_gain":
        return f"On the same tokens, seen with growing context, in nats per token. {interval}."
    if measurement == "key_tokens":
        return f"On those of the same tokens that long context helps, in nats per token. {interval}."
    return f"Right answers. {interval}."


def _cell(measurement: str, entry: Result | None) -> str:
    if entry is None:
        return MISSING
    low, high = entry["low"], entry["high"]
    if measurement == "perplexity":
        ends = "" if low is None else f" ({perplexity(_exp(low))} to {perplexity(_exp(high))})"
        return perplexity(_exp(entry["mean"])) + ends
    if measurement in LOSSES:
        return decimal(entry["mean"], 3) + between(low, high, 3)
    return share(entry["mean"]) + between(low, high, 0, 100)


def _exp(value: float) -> float:
    """A loss as perplexity, at most what a table can show."""
    return math.exp(min(value, 50.0))


def _difference_tables(result: Result) -> list[Table]:
    tables = []
    for span, title in ((INSIDE, "inside"), ("beyond", "beyond")):
        entries = [entry for entry in result["differences"] if entry["span"] == span]
        if not entries:
            continue
        rows = [
            [
                entry["model"],
                TITLES[entry["measurement"]],
                _difference_text(entry),
                p_value(entry["adjusted_p_value"]),
                {"better": "better", "worse": "worse", "open": "not told apart"}[entry["outcome"]],
            ]
            for entry in entries
        ]
        lengths = sorted({length for entry in entries for length in entry["lengths"]})
        where = ", ".join(f"{length:,}" for length in lengths)
        tables.append(
            Table(
                title=f"Against {result['reference']}, {title} the original window ({where} tokens)",
                columns=["name", "measurement", f"minus {result['reference']}", "p (Holm)", "outcome"],
                rows=rows,
                note="Paired by document, prompt and seed. Losses in nats per token (less is better), right answers in "
                "percentage points (more is better). p is corrected for the number of comparisons.",
            )
        )
    return tables


def _difference_text(entry: Result) -> str:
    if entry["measurement"] in LOSSES:
        return decimal(entry["mean"], 3) + between(entry["low"], entry["high"], 3)
    return decimal(100 * entry["mean"], 0) + between(entry["low"], entry["high"], 0, 100)


def _difference_charts(result: Result) -> list[IntervalChart]:
    """How far each is from the reference beyond the window, in loss and in right answers."""
    groups: dict[str, list[Result]] = {}
    for entry in result["differences"]:
        if entry["span"] == "beyond":
            groups.setdefault(entry["measurement"], []).append(entry)
    charts = []
    for measurement, entries in groups.items():
        is_loss = measurement in LOSSES
        scale = 1 if is_loss else 100
        charts.append(
            IntervalChart(
                title=f"{'Loss' if measurement == 'perplexity' else _titled(measurement)} beyond the window",
                x_title=f"minus {result['reference']} ({'nats per token' if is_loss else 'percentage points'})",
                names=[entry["model"] for entry in entries],
                means=[scale * entry["mean"] for entry in entries],
                lows=[_scaled(entry["low"], scale) for entry in entries],
                highs=[_scaled(entry["high"], scale) for entry in entries],
            )
        )
    return charts


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _chart(result: Result, measurement: str, window: int) -> LineChart:
    is_perplexity, is_share = measurement == "perplexity", measurement not in LOSSES
    series = []
    for name, contender in result["compare"].items():
        entries = [entry for entry in contender["intervals"] if entry["measurement"] == measurement]
        if entries:
            series.append(
                Series(
                    name=name,
                    x=[entry["length"] for entry in entries],
                    y=_values(entries, "mean", is_perplexity),
                    low=_values(entries, "low", is_perplexity),
                    high=_values(entries, "high", is_perplexity),
                )
            )
    return LineChart(
        title=f"{_titled(measurement)} by length" if is_perplexity or is_share else _titled(measurement),
        x_title="length (tokens)" if is_perplexity or is_share else "visible context (tokens)",
        y_title="perplexity" if is_perplexity else "right answers" if is_share else "loss (nats per token)",
        series=series,
        window=window,
        is_log=is_perplexity,
        is_share=is_share,
    )


def _values(entries: Sequence[Result], key: str, is_perplexity: bool) -> list[Any]:
    return [_exp(entry[key]) if is_perplexity and entry[key] is not None else entry[key] for entry in entries]


def _titled(measurement: str) -> str:
    return TITLES[measurement].capitalize()
