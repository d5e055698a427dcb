"""Evaluation results side by side, as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

Result = Mapping[str, Any]
# What a finetune result calls its models, and what a reader should.
_RUN_MODELS = {"original": "original", "before": "patched", "after": "finetuned", "control": "control"}
_Values = dict[int, float | None]

_NO_VALUE = "-"
_GAP = "  "
_GROUP_GAP = "   "


def format_table(results: Mapping[str, Result], *, width: int = 100) -> str:
    """Evaluation results as an aligned table: a row per model, a group of columns per measurement.

    Groups that would make the table wider than `width` characters go into a further block below. Accuracies
    are means over depths or templates, weighted by trials; what was not measured is a dash.

    Args:
        results: name of a model (original, patched, finetuned, control, ...) to its `evaluate` result.
    """
    name_width = max(map(len, results), default=0)
    blocks: list[list[Column]] = []
    for column in measured_columns(results):
        used = name_width + sum(len(_GROUP_GAP) + other.width for other in blocks[-1]) if blocks else width
        if used + len(_GROUP_GAP) + column.width > width:
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(_format_block(block, list(results), name_width) for block in blocks)


def measured_models(result: Result) -> dict[str, Result]:
    """The `evaluate` results that a finetune result has, by what to call their models."""
    return {shown: result[name] for name, shown in _RUN_MODELS.items() if (result.get(name) or {}).get("lengths")}


def measured_columns(results: Mapping[str, Result]) -> list[Column]:
    """The measurements that at least one of the models has, in the order of the table.

    Args:
        results: as for `format_table`.
    """
    columns = [
        Column(title, {name: values_of(result) for name, result in results.items()}, form)
        for title, values_of, form in _MEASUREMENTS
    ]
    return [column for column in columns if column.lengths]


class Column:
    """One measurement: a title, a sub-column per length, a cell per model and length.

    Attributes:
        lengths: in tokens; `headers` are the same as text.
        values: model name -> length -> the value, None or absent where it was not measured.
        cells: model name -> the values as text, one for each length.
    """

    def __init__(self, title: str, values: Mapping[str, _Values], form: str) -> None:
        self.title = title
        self.values = values
        self.lengths = sorted({length for found in values.values() for length in found})
        self.cells = {
            name: [_format_value(found.get(length), form) for length in self.lengths] for name, found in values.items()
        }
        self.headers = [f"{length:,}" for length in self.lengths]
        texts = [self.headers, *self.cells.values()]
        self.widths = [max(len(row[index]) for row in texts) for index in range(len(self.lengths))]
        if self.lengths:
            self.widths[0] += max(0, len(title) - self.width)

    @property
    def width(self) -> int:
        return sum(self.widths) + len(_GAP) * (len(self.widths) - 1)

    def line(self, texts: Sequence[str]) -> str:
        return _GAP.join(text.rjust(width) for text, width in zip(texts, self.widths, strict=True))


def _format_block(columns: Sequence[Column], names: Sequence[str], name_width: int) -> str:
    lines = [
        [" " * name_width, *(column.title.ljust(column.width) for column in columns)],
        [" " * name_width, *(column.line(column.headers) for column in columns)],
        *([name.ljust(name_width), *(column.line(column.cells[name]) for column in columns)] for name in names),
    ]
    return "\n".join(_GROUP_GAP.join(parts).rstrip() for parts in lines)


def _format_value(value: float | None, form: str) -> str:
    return _NO_VALUE if value is None else format(value, form)


def _perplexity(result: Result) -> _Values:
    return {entry["length"]: entry["perplexity"] for entry in result.get("perplexity", ())}


def _context_loss(result: Result) -> _Values:
    return {entry["context"]: entry["nll"] for entry in result.get("context_gain", ())}


def _mean_accuracy(key: str) -> Callable[[Result], _Values]:
    def values(result: Result) -> _Values:
        entries = sorted(result.get(key, ()), key=lambda entry: entry["length"])
        means: _Values = {}
        for length, group in groupby(entries, key=lambda entry: entry["length"]):
            found = list(group)
            num_right = sum(entry["accuracy"] * entry["num_trials"] for entry in found)
            means[length] = num_right / sum(entry["num_trials"] for entry in found)
        return means

    return values


_MEASUREMENTS: tuple[tuple[str, Callable[[Result], _Values], str], ...] = (
    ("perplexity", _perplexity, ".2f"),
    ("loss by context", _context_loss, ".3f"),
    ("passkey", _mean_accuracy("passkey"), ".0%"),
    ("unseen needles", _mean_accuracy("needles"), ".0%"),
    ("repeated span", _mean_accuracy("repeated_span"), ".0%"),
)
