"""Evaluation results side by side, as plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from eabf_cli.core.evals.document_counts import documents_told
from eabf_cli.core.evals.retrieval import wilson_interval

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


# ---- One model, every measurement with how sure it is ------------------------------------------------

_Cells = dict[int, str]
_TABLE_WIDTH = 110


def format_evaluation(result: Result) -> str:
    """One model's result in full: a row for each measurement, a column for each length, and what follows from it.

    Losses and perplexities stand with their standard errors, shares of right answers with 95 % intervals.
    """
    rows = [(title, cells_of(result)) for title, cells_of in _ROWS]
    rows = [(title, cells) for title, cells in rows if cells]
    parts = [_length_table("tokens", rows)] if rows else []
    for task, title in (("passkey", "passkey"), ("multi_key", "one key of several")):
        if len({entry["depth"] for entry in result.get(task, ())}) > 1:
            parts.append(f"{title} by depth\n{_length_table('depth', list(_depth_rows(result[task])))}")
    if result.get("perplexity_by_position"):
        parts.append(_position_table(result["perplexity_by_position"]))
    documents = documents_told(result)
    if documents:
        parts.append(f"Documents: {documents}.")
    findings = [*_context_finding(result), *_effective_finding(result)]
    if findings:
        parts.append("\n".join(findings))
    if result.get("notes"):
        parts.append("\n".join(f"Note: {note}" for note in result["notes"]))
    return "\n\n".join(parts)


def _length_table(corner: str, rows: Sequence[tuple[str, _Cells]]) -> str:
    """Rows of cells by length; columns that would make it too wide go into a further block below."""
    lengths = sorted({length for _, cells in rows for length in cells})
    columns = [[f"{length:,}", *(cells.get(length, _NO_VALUE) for _, cells in rows)] for length in lengths]
    titles = [corner, *(title for title, _ in rows)]
    title_width = max(map(len, titles))
    blocks: list[list[list[str]]] = [[]]
    used = title_width
    for column in columns:
        wide = len(_GAP) + max(map(len, column))
        if blocks[-1] and used + wide > _TABLE_WIDTH:
            blocks.append([])
            used = title_width
        blocks[-1].append(column)
        used += wide
    return "\n\n".join(
        "\n".join(
            _GAP.join([title.ljust(title_width), *(column[index].rjust(max(map(len, column))) for column in block)])
            for index, title in enumerate(titles)
        )
        for block in blocks
    )


def _with_error(value: float | None, stderr: float | None, form: str) -> str:
    if value is None:
        return _NO_VALUE
    return format(value, form) + ("" if stderr is None else f" ± {format(stderr, form)}")


def _means(key: str, length: str, value: str, stderr: str, form: str) -> Callable[[Result], _Cells]:
    return lambda result: {
        entry[length]: _with_error(entry[value], entry[stderr], form) for entry in result.get(key, ()) if value in entry
    }


def _shares(key: str) -> Callable[[Result], _Cells]:
    """Right answers of each length, over all depths or templates."""

    def cells(result: Result) -> _Cells:
        entries = sorted(result.get(key, ()), key=lambda entry: entry["length"])
        return {
            length: _share_text(list(group)) for length, group in groupby(entries, key=lambda entry: entry["length"])
        }

    return cells


def _share_text(entries: Iterable[Mapping[str, Any]]) -> str:
    found = list(entries)
    num_trials = sum(entry["num_trials"] for entry in found)
    num_right = sum(entry["accuracy"] * entry["num_trials"] for entry in found)
    lower, upper = wilson_interval(num_right, num_trials)
    return f"{num_right / num_trials:.0%} ({100 * lower:.0f}-{100 * upper:.0f})"


def _depth_rows(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, _Cells]]:
    for depth in sorted({entry["depth"] for entry in entries}):
        yield f"{depth:.0%}", {entry["length"]: _share_text([entry]) for entry in entries if entry["depth"] == depth}


def _position_table(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = ["perplexity by position"]
    for entry in entries:
        span = f"{entry['start']:,} to {entry['end'] - 1:,}"
        lines.append(f"{span:>18}  {_with_error(entry['perplexity'], entry['stderr'], '.2f')}")
    return "\n".join(lines)


def _context_finding(result: Result) -> Iterator[str]:
    """What the longest context changes against the original window."""
    entries = result.get("context_gain", ())
    if len(entries) < 2:
        return
    last = entries[-1]
    reference = next((entry["context"] for entry in entries if entry["difference"] == 0), None)
    if reference is None or reference == last["context"]:
        return
    difference, stderr = last["difference"], last["difference_stderr"]
    word = "lower" if difference < 0 else "higher"
    # With documents as few as these, twice the error is about 95 %.
    sure = "" if stderr is None or abs(difference) > 2 * stderr else ", which may be chance"
    yield (
        f"With {last['context']:,} tokens visible the loss on the same tokens is "
        f"{_with_error(abs(difference), stderr, '.3f')} {word} than with {reference:,}{sure}."
    )


def _effective_finding(result: Result) -> Iterator[str]:
    if "effective_length" not in result or not result.get("retrieval"):
        return
    length = result["effective_length"]
    if length is None:
        yield "Effective length: none. Nothing was retrieved inside the pre-trained window, or it was not measured."
    else:
        yield (
            f"Effective length: {length:,} tokens (pre-trained window "
            f"{result['original_max_position_embeddings']:,}, window {result['max_position_embeddings']:,})."
        )


_ROWS: tuple[tuple[str, Callable[[Result], _Cells]], ...] = (
    ("loss by context", _means("context_gain", "context", "nll", "stderr", ".3f")),
    ("  on key tokens", _means("context_gain", "context", "key_nll", "key_stderr", ".3f")),
    ("perplexity", _means("perplexity", "length", "perplexity", "stderr", ".2f")),
    ("passkey", _shares("passkey")),
    ("unseen needles", _shares("needles")),
    ("one key of several", _shares("multi_key")),
    ("variable tracking", _shares("variable_tracking")),
    ("repeated span", _shares("repeated_span")),
)
