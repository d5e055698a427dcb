"""What every report page of ours begins with: self-contained HTML that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page_environment(package: str) -> Environment:
    """For the templates of a package; what goes into them is escaped."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template_file(package: str, name: str) -> str:
    """A file among a package's templates, as it is."""
    return (files(package) / "templates" / name).read_text(encoding="utf-8")


def page_style(package: str) -> Markup:
    """The style sheet of a package's page: what all pages share, then its own `report.css`."""
    return Markup(template_file("eabf_cli.core", "base.css") + template_file(package, "report.css"))


def source_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def tool_version() -> str | None:
    """This package's version; None where it is not installed."""
    try:
        return version("eabf-cli")
    except PackageNotFoundError:
        return None
