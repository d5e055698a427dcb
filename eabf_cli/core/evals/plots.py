"""The pictures of a report as PNG files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.axes import length_ticks
from eabf_cli.core.evals.views import HeatMap, IntervalChart, LineChart, Report, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES_FILE, MAPS_FILE, INTERVALS_FILE = "perplexity.png", "needles.png", "differences.png"
_DPI = 150
_COLUMNS = 3
_WIDTH, _HEIGHT = 4.6, 3.5


def write_plots(report: Report, folder: Path) -> list[str]:
    """Write what pictures a report has into a folder that exists.

    Returns:
        the files' names.
    """
    figures = {
        LINES_FILE: lines_figure(report.lines),
        MAPS_FILE: maps_figure(report.maps),
        INTERVALS_FILE: intervals_figure(report.intervals),
    }
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        with warnings.catch_warnings():
            # A model's name may have letters that the font lacks; boxes in a title are no news to the user.
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            figure.savefig(folder / name, dpi=_DPI)
        written.append(name)
    return written


def lines_figure(charts: Sequence[LineChart]) -> Figure | None:
    """A panel for each chart, with one legend for all; None without charts."""
    if not charts:
        return None
    figure, panels = _panels(len(charts), _HEIGHT)
    names = list(dict.fromkeys(series.name for chart in charts for series in chart.series))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    drawn: dict[str, Any] = {}
    for axes, chart in zip(panels, charts, strict=True):
        axes.set_title(chart.title, fontsize=10, parse_math=False)
        for series in chart.series:
            drawn.setdefault(series.name, _draw_series(axes, series, colours[series.name]))
        axes.axvline(chart.window, color="#b0413e", linewidth=1, linestyle=":")
        _set_length_axis(axes, [x for series in chart.series for x in series.x])
        axes.set_xlabel(chart.x_title, fontsize=9, parse_math=False)
        axes.set_ylabel(chart.y_title, fontsize=9)
        if chart.is_log:
            _set_log_axis(axes)
        if chart.is_share:
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(_percent_formatter())
        _lighten(axes)
    figure.legend(
        [drawn[name] for name in names], [_plain(name) for name in names], loc="outside lower center", ncols=5,
        fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def maps_figure(maps: Sequence[HeatMap]) -> Figure | None:
    """A panel for each map; None without maps."""
    if not maps:
        return None
    figure, panels = _panels(len(maps), 2.6)
    for axes, found in zip(panels, maps, strict=True):
        cells = [[math.nan if value is None else value for value in row] for row in found.cells]
        # The upper half of the colours is too dark for the numbers in the cells.
        axes.imshow(cells, cmap="Blues", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        for row, values in enumerate(found.cells):
            for column, value in enumerate(values):
                axes.text(
                    column, row, "–" if value is None else f"{100 * value:.0f}", ha="center", va="center", fontsize=8
                )
        axes.set_xticks(range(len(found.lengths)), [f"{length:,}" for length in found.lengths], fontsize=8)
        axes.set_yticks(range(len(found.depths)), [f"{depth:.0%}" for depth in found.depths], fontsize=8)
        axes.set_title(found.title, fontsize=10, parse_math=False)
        axes.set_xlabel("length (tokens)", fontsize=9)
        axes.set_ylabel("depth", fontsize=9)
    return figure


def intervals_figure(charts: Sequence[IntervalChart]) -> Figure | None:
    """A panel for each chart, a row for each name; None without charts."""
    if not charts:
        return None
    most = max(len(chart.names) for chart in charts)
    figure, panels = _panels(len(charts), 1.2 + 0.35 * most)
    for axes, chart in zip(panels, charts, strict=True):
        rows = range(len(chart.names))
        for row, mean, low, high in zip(rows, chart.means, chart.lows, chart.highs, strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color="#0a5a9c", linewidth=2)
            axes.plot([mean], [row], marker="o", color="#0a5a9c", linestyle="")
        axes.axvline(0, color="#8a8a8a", linewidth=1)
        axes.set_yticks(rows, [_plain(name) for name in chart.names], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(chart.title, fontsize=10, parse_math=False)
        axes.set_xlabel(chart.x_title, fontsize=9, parse_math=False)
        _lighten(axes)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(7.0, _WIDTH * columns), height * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def _draw_series(axes: Axes, series: Series, colour: Any) -> Any:
    """The line and its intervals; returns what stands for it in a legend."""
    (line,) = axes.plot(series.x, series.y, color=colour, linewidth=1.4, marker="o", markersize=3)
    for x, low, high in zip(series.x, series.low, series.high, strict=False):
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.6)
    return line


def _set_length_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ticks = length_ticks(values, 6)
    axes.set_xticks(ticks, [f"{value:,.0f}" for value in ticks], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())


def _set_log_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percent_formatter() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette, size = (colormaps["tab10"], 10) if count <= 10 else (colormaps["tab20"], 20)
    return [palette(number % size) for number in range(count)]


def _lighten(axes: Axes) -> None:
    axes.grid(color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
