"""A report as one HTML file that needs no network and runs no script."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eabf_cli.core.evals.svg import heat_map, interval_chart, line_chart, series_class
from eabf_cli.core.evals.views import Report


def render_page(report: Report) -> str:
    """The page's HTML. A report's texts (a model's name, say) are data from elsewhere, and are escaped."""
    style = Markup((files("eabf_cli.core.evals") / "templates" / "report.css").read_text(encoding="utf-8"))
    environment = Environment(
        loader=PackageLoader("eabf_cli.core.evals"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = list(dict.fromkeys(series.name for chart in report.lines for series in chart.series))
    numbers = {name: number for number, name in enumerate(names)}
    return environment.get_template("report.html").render(
        report=report,
        policy=_policy(style),
        style=style,
        version=_version(),
        series_class=series_class,
        names=names,
        lines=[(chart, line_chart(chart, numbers)) for chart in report.lines],
        maps=[(found, heat_map(found)) for found in report.maps],
        intervals=[(chart, interval_chart(chart)) for chart in report.intervals],
    )


def _policy(style: str) -> str:
    """A Content-Security-Policy under which nothing is loaded and no script runs."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; style-src-attr 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _version() -> str | None:
    try:
        return version("eabf-cli")
    except PackageNotFoundError:
        return None
