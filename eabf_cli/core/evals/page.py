"""A report as one HTML file that needs no network and runs no script."""

from __future__ import annotations

from eabf_cli.core.evals.svg import heat_map, interval_chart, line_chart, series_class
from eabf_cli.core.evals.views import Report
from eabf_cli.core.pages import page_environment, page_style, source_hash, tool_version

_PACKAGE = "eabf_cli.core.evals"


def render_page(report: Report) -> str:
    """The page's HTML. A report's texts (a model's name, say) are data from elsewhere, and are escaped."""
    style = page_style(_PACKAGE)
    names = list(dict.fromkeys(series.name for chart in report.lines for series in chart.series))
    numbers = {name: number for number, name in enumerate(names)}
    return (
        page_environment(_PACKAGE)
        .get_template("report.html")
        .render(
            report=report,
            policy=_policy(style),
            style=style,
            version=tool_version(),
            series_class=series_class,
            names=names,
            lines=[(chart, line_chart(chart, numbers)) for chart in report.lines],
            maps=[(found, heat_map(found)) for found in report.maps],
            intervals=[(chart, interval_chart(chart)) for chart in report.intervals],
        )
    )


def _policy(style: str) -> str:
    """A Content-Security-Policy under which nothing is loaded and no script runs."""
    return (
        f"default-src 'none'; img-src data:; style-src '{source_hash(style)}'; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
