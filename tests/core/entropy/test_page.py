"""The page shows the numbers of the result, in a browser, whatever a name holds, and asks the network for nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from eabf_cli.core.entropy.page import MAX_POSITIONS, kept_positions, render_page, table_positions, write_page
from eabf_cli.core.entropy.panels import panels_of
from tests.browser import Browser, assert_quiet_fitting_and_legible, needs_browser, open_browser
from tests.core.entropy.made_up_result import WINDOW, made_up_result
from tests.core.entropy.test_plots import without_slopes

HOSTILE = '</title></script><script>window.hacked = true</script><img src=x onerror="window.hacked = true">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


def drawn_data(html: str) -> dict[str, Any]:
    """The JSON that the page draws from, found as a browser does."""

    class Finder(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = tag == "script" and ("id", "data") in attrs

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.text += data

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    finder = Finder()
    finder.feed(html)
    found = json.loads(finder.text)
    assert isinstance(found, dict)
    return found


# ---- What is written ---------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_result_to_four_digits() -> None:
    result = made_up_result(compare=True)
    data = drawn_data(render_page(result))
    assert data["positions"] == result["positions"]
    expected = [
        (result["entropy"], result["stderr"]),
        (result["compare"]["entropy"], result["compare"]["stderr"]),
        (result["compare"]["difference"], result["compare"]["difference_stderr"]),
    ]
    for panel, (curves, stderr) in zip(data["panels"], expected, strict=True):
        for layer in range(len(curves)):
            for head in range(len(curves[layer])):
                assert panel["curves"][layer][head] == pytest.approx(curves[layer][head], rel=5e-4)
                assert panel["stderr"][layer][head] == pytest.approx(stderr[layer][head], rel=5e-2)


def test_large_results_are_thinned_and_say_so() -> None:
    result = made_up_result(num_layers=80, num_heads=64, num_positions=90, compare=True)
    html = render_page(result)
    data = drawn_data(html)
    assert len(html.encode()) < 3_000_000
    kept, total = len(data["positions"]), len(result["positions"])
    assert 10 <= kept < total
    assert f"This page keeps {kept} of {total} positions" in re.sub(r"\s+", " ", html)
    at = [result["positions"].index(n) for n in data["positions"]]
    assert data["panels"][0]["curves"][5][7] == pytest.approx([result["entropy"][5][7][i] for i in at], rel=5e-4)


def test_small_results_keep_every_position() -> None:
    assert "This page keeps" not in render_page(made_up_result())


def test_kept_positions_of_very_many_span_them_evenly_on_a_log_axis() -> None:
    positions = list(range(1, 16_385))
    small = made_up_result(num_layers=2, num_heads=2)
    kept = [positions[index] for index in kept_positions(positions, panels_of(small))]
    assert 32 < len(kept) <= MAX_POSITIONS
    assert (kept[0], kept[-1]) == (1, 16_384)
    ratios = [b / a for a, b in pairwise(kept) if a > 100]
    assert max(ratios) < 1.2


def test_names_and_texts_are_escaped_everywhere() -> None:
    result = made_up_result(model=HOSTILE, compare=True)
    result["dataset"] = result["suggestion"]["reason"] = result["compare"]["model"] = result["notes"][0] = HOSTILE
    html = render_page(result)
    assert "<script>window" not in html
    assert "<img" not in html
    # The page's own elements: the data and the program.
    assert html.count("</script>") == 2
    assert drawn_data(html)["panels"][0]["title"] == f"{HOSTILE} (eabf)"


def test_unmeasured_slopes_are_null_in_the_data_and_a_dash_in_the_table() -> None:
    html = render_page(without_slopes())
    assert {cell for row in drawn_data(html)["panels"][0]["cells"] for cell in row} == {None}
    assert "NaN" not in html.split('id="data"')[1].split("</script>")[0]
    assert "<td>–</td>" in re.sub(r"\s+</td>", "</td>", html)


@pytest.mark.parametrize(
    ("unscaled_layers", "rope_theta", "expected"),
    [
        ([0, 1], 500_000.0, "--unscaled-layers 0,1 --rope-theta 500000"),
        ([], 8_912_345.5, "--unscaled-layers none --rope-theta 8912345.5"),
        ([2], None, "--unscaled-layers 2"),
    ],
)
def test_recommendation_is_given_as_options(
    unscaled_layers: list[int], rope_theta: float | None, expected: str
) -> None:
    result = made_up_result()
    result["suggestion"] |= {"unscaled_layers": unscaled_layers, "rope_theta": rope_theta}
    assert f"<pre>{expected}</pre>" in render_page(result)


def test_no_options_where_nothing_can_be_recommended() -> None:
    result = made_up_result()
    result["suggestion"] = {"unscaled_layers": None, "rope_theta": None, "reason": "no layer has RoPE"}
    html = render_page(result)
    assert "No layer has RoPE." in html
    assert "<pre>" not in html


def test_table_columns_are_measured_positions() -> None:
    assert table_positions([1, 100, 250, 2_000, 2_100, 8_000], WINDOW) == [250, 2_000, 8_000]
    assert table_positions([64, 128], WINDOW) == [128]


# ---- In a browser ------------------------------------------------------------------------------------------


def move_to(browser: Browser, selector: str, x: float, y: float) -> None:
    """Put the pointer on a place of an element, given in its own pixels."""
    left, top = browser.script(
        "const node = document.querySelector(arguments[0]); node.scrollIntoView({ block: 'center' });"
        "const box = node.getBoundingClientRect(); return [box.left, box.top];",
        selector,
    )
    event = {"type": "mouseMoved", "x": left + x, "y": top + y}
    browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def centre_of(browser: Browser, selector: str, part: str, index: int) -> tuple[float, float]:
    """The centre of an element's part, in the element's own pixels."""
    x, y = browser.script(
        "const node = document.querySelector(arguments[0]); const box = node.getBoundingClientRect();"
        "const part = node.querySelectorAll(arguments[1])[arguments[2]].getBoundingClientRect();"
        "return [part.left + part.width / 2 - box.left, part.top + part.height / 2 - box.top];",
        selector,
        part,
        index,
    )
    return x, y


def pick_layer(browser: Browser, layer: int) -> None:
    Select(browser.driver.find_element("id", "layer")).select_by_value(str(layer))


def tip(browser: Browser) -> list[str]:
    """The rows of the tooltip; none while it is hidden."""
    rows = browser.script("const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.innerText")
    return [row for row in rows.replace("−", "-").split("\n") if row]


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("compare", [False, True])
def test_page_is_quiet_fits_and_is_legible(
    browser: Browser, tmp_path: Path, width: int, dark: bool, compare: bool
) -> None:
    long_name = "/a/long/folder/with-a-name-that-has-no-space-in-it-at-all-and-goes-on-and-on-until-it-ends"
    path = write_page(made_up_result(compare=compare, scores=True, model=long_name), tmp_path)
    browser.open(path, width=width, dark=dark)
    assert_quiet_fitting_and_legible(browser)


@needs_browser
def test_the_checks_of_a_page_can_fail(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='color: #999; background: #fff'>pale<div style='width: 2000px'>wide</div>"
        "<script>fetch('http://localhost:9/x').catch(() => {}); console.error('broken')</script>"
    )
    browser.open(page)
    assert any("broken" in message for message in browser.console())
    assert browser.requests() == ["http://localhost:9/x"]
    assert browser.overflow() > 700
    assert browser.lowest_contrast()[0] == pytest.approx(2.85, abs=0.01)


@needs_browser
def test_everything_is_drawn(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result(compare=True, scores=True)
    browser.open(write_page(result, tmp_path))
    num_layers, num_heads = len(result["entropy"]), len(result["entropy"][0])
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.script(count, ".panel") == 3
    assert browser.script(count, ".layers .line") == 3 * num_layers
    assert browser.script(count, ".heads .line") == 3 * num_heads
    assert browser.script(count, ".layers-table tbody tr") == num_layers
    assert browser.script(count, ".scores-table tbody tr") == num_layers
    dashed = "return document.querySelectorAll('.panel:first-of-type .layers .line.sliding').length"
    assert browser.script(dashed) == sum(layer["kind"] == "sliding" for layer in result["layers"])


@needs_browser
def test_pointing_at_a_cell_shows_that_heads_slope_and_curves(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result()
    browser.open(write_page(result, tmp_path))
    layer, head = 5, 3
    number = layer * len(result["entropy"][0]) + head
    move_to(browser, ".cells svg", *centre_of(browser, ".cells svg", ".cell:not(.scale)", number))
    assert tip(browser) == [f"layer {layer}, head {head}", f"slope {result['head_slope'][layer][head]:.3f}"]
    assert browser.script("return document.querySelector('.heads figcaption').innerText") == "Head by head: layer 5"
    chosen = browser.script("return document.querySelector('.heads .line.active').getAttribute('d')")
    heights = [float(pair.split(",")[1]) for pair in re.findall(r"[\d.]+,[\d.]+", chosen)]
    assert_proportional(heights, result["entropy"][layer][head])


def assert_proportional(pixels: list[float], values: list[float]) -> None:
    """Heights on the screen are the values up to an offset and a negative scale."""
    low, high = values.index(min(values)), values.index(max(values))
    scale = (pixels[high] - pixels[low]) / (values[high] - values[low])
    assert scale < 0
    expected = [pixels[low] + scale * (value - values[low]) for value in values]
    assert pixels == pytest.approx(expected, abs=0.2)


@needs_browser
def test_pointing_at_a_heads_line_shows_its_entropy_and_error(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result()
    browser.open(write_page(result, tmp_path))
    pick_layer(browser, 5)
    move_to(browser, ".heads svg", 600, 120)
    name, position, entropy, share = tip(browser)
    layer, head = (int(number) for number in re.findall(r"\d+", name))
    assert layer == 5
    at = result["positions"].index(int(position.removeprefix("position ").replace(",", "")))
    value, stderr = result["entropy"][layer][head][at], result["stderr"][layer][head][at]
    found = [float(number) for number in re.findall(r"[\d.]+", entropy)]
    assert found == pytest.approx([value, stderr], abs=1e-3)
    assert share.startswith(f"{100 * value / math.log(result['visible_keys'][layer][at]):.0f} %")


@needs_browser
def test_one_document_has_no_error_to_show(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(made_up_result(num_documents=1), tmp_path))
    move_to(browser, ".heads svg", 600, 120)
    assert "±" not in "".join(tip(browser))
    assert "±" not in browser.script("return document.querySelector('.layers-table').innerText")


@needs_browser
def test_charts_are_reached_and_read_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result()
    browser.open(write_page(result, tmp_path))
    browser.script("document.getElementById('layer').focus()")
    keyboard = browser.driver.switch_to.active_element
    keyboard.send_keys(Keys.TAB)
    chart = browser.driver.switch_to.active_element
    assert chart.tag_name == "svg"
    chart.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_LEFT)
    mean = sum(curve[-2] for curve in result["entropy"][2]) / len(result["entropy"][2])
    assert tip(browser)[:3] == [
        "layer 2, mean over heads",
        f"position {result['positions'][-2]:,}",
        f"entropy {mean:.3f} nats",
    ]
    assert chart.get_attribute("aria-label").endswith("chosen: layer 2")
    chart.send_keys(Keys.TAB)
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert tip(browser) == ["layer 2, head 1", f"slope {result['head_slope'][2][1]:.3f}"]


@needs_browser
def test_sliding_layers_are_measured_against_what_they_see(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result()
    browser.open(write_page(result, tmp_path))
    pick_layer(browser, 3)
    move_to(browser, ".heads svg", 1000, 120)
    assert tip(browser)[0].startswith("layer 3 (sliding window), head")
    assert tip(browser)[-1].endswith("of its bound, 6.24")  # ln 512


@needs_browser
def test_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    result = made_up_result(model=HOSTILE)
    result["dataset"] = result["suggestion"]["reason"] = HOSTILE
    browser.open(write_page(result, tmp_path))
    assert browser.script("return window.hacked") is None
    assert browser.script("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.console() == []


@needs_browser
def test_policy_refuses_scripts_and_requests_that_are_not_the_pages_own(browser: Browser, tmp_path: Path) -> None:
    path = write_page(made_up_result(), tmp_path)
    added = "<script>window.hacked = true</script><img src='http://localhost:9/x.png'></main>"
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    browser.open(path)
    assert browser.script("return window.hacked") is None
    assert len(browser.console()) == 2


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_large_and_unknown_results_are_drawn(browser: Browser, tmp_path: Path, width: int) -> None:
    for result in (made_up_result(num_layers=40, num_heads=64), without_slopes(compare=True)):
        browser.open(write_page(result, tmp_path), width=width)
        assert browser.console() == []
        assert browser.overflow() == 0
        assert browser.script("return document.querySelectorAll('.panel:first-of-type .layers .line').length") == len(
            result["layers"]
        )
