"""The page shows the numbers of the result, in a browser, whatever a name holds, and asks the network for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.evals.page import render_page
from eabf_cli.core.evals.report import view
from eabf_cli.core.evals.svg import NUM_STYLES, series_class
from tests.browser import Browser, assert_quiet_fitting_and_legible, needs_browser, open_browser
from tests.core.evals.made_up_results import LENGTHS, made_up_comparison, made_up_evaluation, made_up_verdict

HOSTILE = '</title></style><script>window.hacked = true</script><img src=x onerror="window.hacked = true">'
RESULTS = {"evaluation": made_up_evaluation(), "comparison": made_up_comparison(), "verdict": made_up_verdict()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def write(result: dict[str, Any], folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(render_page(view(result)), encoding="utf-8")
    return path


def test_names_and_texts_are_escaped_everywhere() -> None:
    result = made_up_comparison()
    result["compare"] = {f"{name}{HOSTILE}": entry for name, entry in result["compare"].items()}
    result["reference"] = next(name for name in result["compare"] if name.startswith("eabf"))
    result["model"] = result["dataset"] = result["summary"][0] = HOSTILE
    result["notes"] = [HOSTILE]
    html = render_page(view(result))
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("</style>") == 1


def test_more_series_than_colours_are_told_apart_by_dashes() -> None:
    classes = [series_class(number) for number in range(2 * NUM_STYLES)]
    assert len(set(classes)) == 2 * NUM_STYLES
    style = render_page(view(RESULTS["comparison"])).split("<style>")[1].split("</style>")[0]
    for number in range(NUM_STYLES):
        assert f".s{number} {{" in style


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
@pytest.mark.parametrize("kind", RESULTS)
def test_page_is_quiet_fits_and_is_legible(browser: Browser, tmp_path: Path, kind: str, width: int, dark: bool) -> None:
    long_name = "/a/long/folder/with-a-name-that-has-no-space-in-it-at-all-and-goes-on-and-on-until-it-ends"
    browser.open(write(RESULTS[kind] | {"model": long_name}, tmp_path), width=width, dark=dark)
    assert_quiet_fitting_and_legible(browser)


@needs_browser
def test_everything_is_drawn_and_nothing_outside_its_picture(browser: Browser, tmp_path: Path) -> None:
    report = view(RESULTS["comparison"])
    browser.open(write(RESULTS["comparison"], tmp_path))
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.script(count, ".chart .line") == sum(len(chart.series) for chart in report.lines)
    assert browser.script(count, ".chart .point") == sum(len(s.x) for chart in report.lines for s in chart.series)
    assert browser.script(count, ".cell") == sum(len(row) for found in report.maps for row in found.cells)
    assert browser.script(count, ".mean") == sum(len(chart.names) for chart in report.intervals)
    assert browser.script(count, "tbody tr") == sum(len(table.rows) for table in report.tables)
    outside = browser.script(
        "return [...document.querySelectorAll('svg')].flatMap((svg) => {"
        "const frame = svg.getBoundingClientRect();"
        "return [...svg.querySelectorAll('path, line, circle, rect, text')].filter((node) => {"
        "const box = node.getBoundingClientRect();"
        "return box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2"
        " || box.bottom > frame.bottom + 2; }).map((node) => node.outerHTML); })"
    )
    assert outside == []


@needs_browser
def test_points_stand_at_the_height_of_their_values(browser: Browser, tmp_path: Path) -> None:
    """On the passkey's axis, from 0 % to 100 %; each point tells its numbers."""
    browser.open(write(RESULTS["comparison"], tmp_path))
    points = browser.script(
        "const figure = [...document.querySelectorAll('.chart')].find((f) => f.innerText.includes('Passkey'));"
        "const top = (node) => { const box = node.getBoundingClientRect(); return (box.top + box.bottom) / 2; };"
        "const grid = [...figure.querySelectorAll('.grid')].map(top);"
        "return [...figure.querySelectorAll('.point')].map((node) => ["
        "(Math.max(...grid) - top(node)) / (Math.max(...grid) - Math.min(...grid)),"
        " node.querySelector('title').textContent]);"
    )
    intervals = [
        (name, entry)
        for name, contender in RESULTS["comparison"]["compare"].items()
        for entry in contender["intervals"]
        if entry["measurement"] == "passkey"
    ]
    assert len(points) == len(intervals) == 4 * len(LENGTHS)
    for (height, told), (name, entry) in zip(points, intervals, strict=True):
        assert height == pytest.approx(entry["mean"], abs=0.01)
        found = [round(100 * entry[key]) for key in ("mean", "low", "high")]
        assert told == "{}, {:,} tokens: {} % ({} % to {} %)".format(name, entry["length"], *found)


@needs_browser
def test_intervals_lie_as_the_numbers_say(browser: Browser, tmp_path: Path) -> None:
    browser.open(write(RESULTS["verdict"], tmp_path))
    bars, zero = browser.script(
        "const x = (node, key) => Number(node.getAttribute(key));"
        "return [[...document.querySelectorAll('.interval')].map((node) => [x(node, 'x1'), x(node, 'x2')]),"
        " x(document.querySelector('.zero'), 'x1')];"
    )
    found = [row["difference"] for row in RESULTS["verdict"]["verdict"]["rows"] if "difference" in row]
    scale = (bars[0][1] - zero) / found[0]["high"]
    assert scale > 0
    for (left, right), entry in zip(bars, found, strict=True):
        assert left == pytest.approx(zero + scale * entry["low"], abs=0.3)
        assert right == pytest.approx(zero + scale * entry["high"], abs=0.3)


@needs_browser
def test_policy_refuses_scripts_and_requests(browser: Browser, tmp_path: Path) -> None:
    path = write(made_up_verdict(model=HOSTILE), tmp_path)
    added = "<script>window.hacked = true</script><img src='http://localhost:9/x.png'></main>"
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    browser.open(path)
    assert browser.script("return window.hacked") is None
    assert browser.script("return document.querySelector('h1').textContent") == HOSTILE
    assert len(browser.console()) == 2


def test_a_page_of_many_methods_stays_small() -> None:
    names = tuple(f"method{number}" for number in range(12))
    html = render_page(view(made_up_comparison(names)))
    assert len(html.encode()) < 500_000
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
