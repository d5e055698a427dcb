"""What a report shows, whatever form it has: facts, tables, line charts, maps and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of finished texts.

    Attributes:
        rows: of as many cells as there are columns; the first cell names the row.
        note: how to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: values at positions, with the ends of their intervals where those are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over lengths or positions, in tokens, on a logarithmic axis.

    Attributes:
        window: the pre-trained window, which is marked.
        is_log: the vertical axis is logarithmic (perplexities span orders of magnitude), too.
        is_share: values are shares, 0 to 1, shown in percent.
    """

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    window: int
    is_log: bool = False
    is_share: bool = False


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Shares of right answers by length (columns) and depth (rows); None where nothing was measured."""

    title: str
    lengths: Sequence[int]
    depths: Sequence[float]
    cells: Sequence[Sequence[float | None]]
    num_trials: int


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Means with their intervals, one below the other, against zero."""

    title: str
    x_title: str
    names: Sequence[str]
    means: Sequence[float]
    lows: Sequence[float | None]
    highs: Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report shows of a result.

    Attributes:
        kind: what was done ("Comparison of methods").
        subject: the model.
        headlines: what it comes to, in sentences.
        facts: terms and their values.
    """

    kind: str
    subject: str
    headlines: Sequence[str]
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    lines: Sequence[LineChart] = ()
    maps: Sequence[HeatMap] = ()
    intervals: Sequence[IntervalChart] = ()
