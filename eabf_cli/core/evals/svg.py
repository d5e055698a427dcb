"""A report's pictures as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from eabf_cli.core.evals.axes import length_ticks, linear_ticks, log_ticks, padded
from eabf_cli.core.evals.numbers import decimal, share
from eabf_cli.core.evals.views import HeatMap, IntervalChart, LineChart, Series

NUM_STYLES = 10
"""Colours of series in the style sheet; more series begin again, dashed."""

_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 46
_ROW = 46
_EDGE = 24


def line_chart(chart: LineChart, numbers: Mapping[str, int]) -> Markup:
    """Lines with their intervals.

    Args:
        numbers: of each series' name, which gives it its colour on the whole page.
    """
    x_values = [x for series in chart.series for x in series.x]
    y_values = [value for series in chart.series for value in _drawn_values(series)]
    x = _log_scale(*padded(min(x_values), max(x_values), is_log=True), _LEFT, _WIDTH - _RIGHT)
    low, high = (0.0, 1.0) if chart.is_share else padded(min(y_values), max(y_values), is_log=chart.is_log)
    scale = _log_scale if chart.is_log else _linear_scale
    y = scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for value in log_ticks(low, high, 7) if chart.is_log else linear_ticks(low, high, 6):
        label = share(value) if chart.is_share else _tick(value)
        parts += [
            _tag("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value)),
            _text(label, x=_LEFT - 6, y=y(value) + 4, anchor="end"),
        ]
    for value in length_ticks(x_values, 6):
        parts += [
            _tag("line", class_="axis", x1=x(value), x2=x(value), y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM + 4),
            _text(f"{value:,.0f}", x=x(value), y=_HEIGHT - _BOTTOM + 18, anchor="middle"),
        ]
    if min(x_values) <= chart.window <= max(x_values):
        parts.append(
            _tag("line", class_="window", x1=x(chart.window), x2=x(chart.window), y1=_TOP, y2=_HEIGHT - _BOTTOM)
        )
    parts.append(_text(chart.x_title, x=_WIDTH - _RIGHT, y=_HEIGHT - 8, anchor="end"))
    parts += [_series(series, numbers[series.name], x, y, chart) for series in chart.series]
    return _svg(_HEIGHT, f"{chart.title}: {chart.y_title} against {chart.x_title}", parts)


def _drawn_values(series: Series) -> list[float]:
    return [value for value in (*series.y, *series.low, *series.high) if value is not None]


def _series(
    series: Series, number: int, x: Callable[[float], float], y: Callable[[float], float], chart: LineChart
) -> Markup:
    points = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
    parts = [_tag("path", class_="line", d="M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points))]
    ends = list(zip(series.low, series.high, strict=True)) or [(None, None)] * len(points)
    for (low, high), (left, top), length, value in zip(ends, points, series.x, series.y, strict=True):
        told = f"{series.name}, {length:,.0f} tokens: {_value(value, chart)}"
        if low is not None and high is not None:
            parts.append(_tag("line", class_="error", x1=left, x2=left, y1=y(low), y2=y(high)))
            told += f" ({_value(low, chart)} to {_value(high, chart)})"
        parts.append(_tag("circle", _tag("title", escape(told)), class_="point", cx=left, cy=top, r=3))
    return _tag("g", Markup("").join(parts), class_=series_class(number))


def series_class(number: int) -> str:
    """The style of a series: its colour, and dashes from the eleventh on."""
    return f"series s{number % NUM_STYLES}" + (" again" if number >= NUM_STYLES else "")


def heat_map(found: HeatMap) -> Markup:
    """Shares as shaded cells with their numbers in them; the shallowest depth on top."""
    left, top, bottom, row = 52, 4, 42, 30
    width = (_WIDTH - left - 4) / len(found.lengths)
    height = top + row * len(found.depths) + bottom
    parts = []
    for line, (depth, cells) in enumerate(zip(found.depths, found.cells, strict=True)):
        middle = top + row * line + row / 2 + 4
        parts.append(_text(share(depth), x=left - 6, y=middle, anchor="end"))
        for column, value in enumerate(cells):
            kind = "cell" if value is not None else "cell absent"
            style = f"--share: {100 * (value or 0):.0f}%"
            place = {"x": left + column * width, "y": top + row * line, "width": width - 1, "height": row - 1}
            parts.append(_tag("rect", class_=kind, style=style, **place))
            shown = "–" if value is None else f"{100 * value:.0f}"
            parts.append(_text(shown, x=left + (column + 0.5) * width, y=middle, anchor="middle", class_="number"))
    base = top + row * len(found.depths)
    for column, length in enumerate(found.lengths):
        parts.append(_text(f"{length:,}", x=left + (column + 0.5) * width, y=base + 17, anchor="middle"))
    parts.append(_text("depth ↑   length (tokens) →", x=_WIDTH - 4, y=base + 36, anchor="end"))
    return _svg(height, f"{found.title}: percent of right answers by depth and length", parts)


def interval_chart(chart: IntervalChart) -> Markup:
    """A row for each name: the name, and below it the mean and its interval against zero."""
    values = [0.0, *chart.means, *(end for end in (*chart.lows, *chart.highs) if end is not None)]
    low, high = padded(min(values), max(values), is_log=False)
    x = _linear_scale(low, high, 8, _WIDTH - 8)
    base = _ROW * len(chart.names) + 6
    parts = []
    for value in linear_ticks(low, high, 6):
        parts.append(_tag("line", class_="grid", x1=x(value), x2=x(value), y1=4, y2=base))
        # A label at the picture's edge would be cut off.
        if _EDGE <= x(value) <= _WIDTH - _EDGE:
            parts.append(_text(_tick(value), x=x(value), y=base + 16, anchor="middle"))
    parts.append(_tag("line", class_="zero", x1=x(0), x2=x(0), y1=4, y2=base))
    rows = zip(chart.names, chart.means, chart.lows, chart.highs, strict=True)
    for number, (name, mean, lower, upper) in enumerate(rows):
        y = _ROW * number + 34
        told = f"{name}: {decimal(mean, 3)}"
        parts.append(_text(name, x=8, y=y - 14, class_="name"))
        if lower is not None and upper is not None:
            parts.append(_tag("line", class_="interval", x1=x(lower), x2=x(upper), y1=y, y2=y))
            told += f" ({decimal(lower, 3)} to {decimal(upper, 3)})"
        parts.append(_tag("circle", _tag("title", escape(told)), class_="mean", cx=x(mean), cy=y, r=5))
    parts.append(_text(chart.x_title, x=_WIDTH - 8, y=base + 36, anchor="end"))
    return _svg(base + 44, f"{chart.title}: {chart.x_title}", parts)


# ---- Elements ------------------------------------------------------------------------------------------


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return _tag("svg", Markup("").join(parts), viewBox=f"0 0 {_WIDTH} {height:g}", role="img", **{"aria-label": label})


def _tag(name: str, content: Markup | None = None, /, **attributes: Any) -> Markup:
    """An element; numbers with one decimal, texts escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_"), f"{value:.1f}" if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, content if content is not None else Markup(""))


def _text(text: str, *, x: float, y: float, anchor: str = "start", class_: str = "") -> Markup:
    attributes = {"class": class_} if class_ else {}
    return _tag("text", escape(text), x=float(x), y=float(y), **{"text-anchor": anchor}, **attributes)


def _linear_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _log_scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low)
    return lambda value: start + math.log(value / low) / span * (end - start)


def _tick(value: float) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _value(value: float, chart: LineChart) -> str:
    return share(value) if chart.is_share else decimal(value, 2 if chart.is_log else 3)
