"""A report as Markdown, which is also what the terminal shows of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eabf_cli.core.evals.views import Report, Table

_SPECIAL = re.compile(r"[\\|<>`*_\[\]]")


def render_markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as a Markdown document.

    Args:
        pictures: files beside it that are shown.
    """
    parts = [f"# {report.kind}: {_escaped(report.subject)}"]
    parts += [_escaped(sentence) for sentence in report.headlines]
    parts.append("\n".join(f"- {term}: {_escaped(value)}" for term, value in report.facts))
    if report.notes:
        parts.append("\n".join(f"- Note: {_escaped(note)}" for note in report.notes))
    parts += [f"![{name}]({name})" for name in pictures]
    for table in report.tables:
        parts.append(f"## {_escaped(table.title)}")
        if table.note:
            parts.append(_escaped(table.note))
        parts.append(_pipe_table(table))
    return "\n\n".join(parts) + "\n"


def render_text(report: Report) -> str:
    """The report for a terminal: what it comes to, and the tables."""
    parts = [f"{report.kind}: {report.subject}", *report.headlines]
    for table in report.tables:
        parts.append(f"{table.title}\n{_plain_table(table)}")
    parts += [f"Note: {note}" for note in report.notes]
    return "\n\n".join(parts)


def _pipe_table(table: Table) -> str:
    rows = [[_escaped(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(table.columns))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def _plain_table(table: Table) -> str:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _escaped(text: str) -> str:
    """A text in which nothing is markup, in one line."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))
