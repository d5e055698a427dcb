"""The documentation site builds without a warning, needs no network, and documents what the package offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import eabf_cli
from eabf_cli.cli import main as app

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"


class _Elements(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def elements(page: Path) -> list[tuple[str, dict[str, str]]]:
    parser = _Elements()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Broken links, links to missing headings and pages outside the navigation fail the build."""
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        name = "" if page.stem == "index" else page.stem
        assert (site / name / "index.html").is_file(), page.name


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = []
    for page in site.rglob("*.html"):
        for tag, attributes in elements(page):
            # A link that a reader may follow is none that the page needs.
            if tag != "a" and attributes.get("rel") != "canonical":
                loaded += [attributes[name] for name in ("src", "href") if name in attributes]
    assert loaded
    assert [address for address in loaded if re.match(r"(?:\w+:)?//", address)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_each_command_has_a_page_that_leads_to_its_options(site: Path) -> None:
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    (commands,) = (entry["Commands"] for entry in navigation if "Commands" in entry)
    pages = {title: page for entry in commands for title, page in entry.items() if title.startswith("eabf ")}
    assert set(pages) == {f"eabf {name}" for name in app.commands}
    headings = {attributes.get("id") for _, attributes in elements(site / "cli" / "index.html")}
    for title, page in pages.items():
        anchor = title.replace(" ", "-")
        assert f"(cli.md#{anchor})" in (DOCS / page).read_text(encoding="utf-8"), page
        assert anchor in headings


def test_the_api_page_shows_the_docstring_of_every_exported_name(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    shown = " ".join(re.sub(r"<[^>]+>", "", page).replace("&#39;", "'").split())
    for name in eabf_cli.__all__:
        value = getattr(eabf_cli, name)
        assert f'.{name}"' in page, name
        if callable(value):
            first_line = (value.__doc__ or "").split("\n")[0].replace("`", "")
            assert first_line in shown, name


def test_a_nested_list_is_one(site: Path) -> None:
    """Markdown for sites wants four spaces where a repository's pages are content with three."""
    page = (site / "extending" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*(?:<p>)?<strong>The entry\..*?<ul>\s*<li>", page, re.DOTALL)
