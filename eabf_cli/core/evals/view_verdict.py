"""What a report shows of a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eabf_cli.core.evals.numbers import between, decimal, perplexity, share
from eabf_cli.core.evals.views import IntervalChart, Report, Table

Result = Mapping[str, Any]


def view_verdict(result: Result) -> Report:
    """The report of a `verdict` result."""
    verdict = result["verdict"]
    return Report(
        kind="Verdict on documents",
        subject=str(result["model"]),
        headlines=[verdict["sentence"], _inside(verdict, result["original_max_position_embeddings"])],
        facts=[
            ("Original", f"{result['original']} ({result['original_reason']})"),
            ("Original window", f"{result['original_max_position_embeddings']:,} tokens"),
            ("Extended window", f"{result['max_position_embeddings']:,} tokens"),
            ("Text", str(result["dataset"])),
            ("Measured on", _amount(verdict)),
        ],
        notes=list(result["notes"]),
        tables=[_table(verdict)],
        intervals=[_chart(verdict)],
    )


def _amount(verdict: Result) -> str:
    return (
        f"{verdict['num_tokens']:,} tokens in {verdict['num_stretches']:,} stretches of "
        f"{verdict['num_documents']:,} document{'' if verdict['num_documents'] == 1 else 's'}"
    )


def _inside(verdict: Result, window: int) -> str:
    found = verdict["inside"]
    cost = f"{decimal(abs(found['mean']), 3)} nats a token"
    low, high = found["low"], found["high"]
    if low is None or low <= 0 <= high:
        comparison = (
            f"about as good as the original (difference {decimal(found['mean'], 3)}{between(low, high, 3)} nats)"
        )
    else:
        comparison = f"{cost} {'worse' if found['mean'] > 0 else 'better'} than the original{between(low, high, 3)}"
    return f"Given no more than the last {window:,} tokens, as the original is, the extended model is {comparison}."


def _table(verdict: Result) -> Table:
    rows = []
    for row in verdict["rows"]:
        found = row.get("difference")
        behind = "" if found is None else decimal(found["mean"], 3) + between(found["low"], found["high"], 3)
        rows.append([row["title"], perplexity(row["perplexity"]), decimal(row["nll"], 3), behind])
    return Table(
        title="How well the same tokens are predicted",
        columns=["what is read", "perplexity", "loss", "behind the extended model"],
        rows=rows,
        note=f"Losses in nats per token. Intervals: {share(verdict['required_confidence'])}, from the bootstrap over "
        f"{verdict['resampled']}, paired.",
    )


def _chart(verdict: Result) -> IntervalChart:
    rows = [row for row in verdict["rows"] if "difference" in row]
    return IntervalChart(
        title="Behind the extended model",
        x_title="loss minus the extended model's (nats per token)",
        names=[row["title"] for row in rows],
        means=[row["difference"]["mean"] for row in rows],
        lows=[row["difference"]["low"] for row in rows],
        highs=[row["difference"]["high"] for row in rows],
    )
