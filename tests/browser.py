"""A headless Chromium for tests of pages, and what such a test wants to know of a page."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="chromium and chromedriver are not installed"
)
# Without those about the background, Chromium looks for its maker's hosts at every start.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

# Text that is seen -> the lowest WCAG contrast of a text's colour with the first opaque ground behind it.
_LOWEST_CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = (colour) => {
  const shares = rgba(colour).map((v) => v / 255);
  const [r, g, b] = shares.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (rgba(colour)[3] === 255) return colour;
  }
  return "white";
};
let lowest = { ratio: 21, text: "" };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text = walker.nextNode(); text; text = walker.nextNode()) {
  const node = text.parentElement;
  if (!text.data.trim() || !node.checkVisibility() || node.closest("script, noscript")) continue;
  const style = getComputedStyle(node);
  const [a, b] = [luminance(node instanceof SVGElement ? style.fill : style.color), luminance(ground(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < lowest.ratio) lowest = { ratio, text: text.data.trim() };
}
return lowest;
"""


class Browser:
    """One Chromium process; `driver` is selenium's."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file in a viewport of this size (pixels) and colour scheme; the logs start anew."""
        # What was open before, Chromium's own start page at first, may still be loading.
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())
        # Two frames: the page may draw itself in an observer's callback.
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def console(self) -> list[str]:
        """What the page has logged since it was opened, errors and refusals of its policy among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened, but for those that need no network."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:", "about:", "chrome:"))]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the viewport."""
        return self.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def lowest_contrast(self) -> tuple[float, str]:
        """The lowest WCAG contrast ratio among the page's texts, and that text."""
        lowest = self.script(_LOWEST_CONTRAST)
        return lowest["ratio"], lowest["text"]

    def screenshot(self, path: Path) -> None:
        """The whole page, as a PNG."""
        height = self.script("return document.documentElement.scrollHeight")
        metrics = {"width": self.script("return innerWidth"), "height": height}
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {**metrics, "deviceScaleFactor": 1, "mobile": False}
        )
        self.driver.save_screenshot(str(path))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium with a new profile; it ends with the block."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="eabf-chromium-", ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        # The driver's path is given, so that selenium does not look for one on the network.
        driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            yield Browser(driver)
        finally:
            driver.quit()


def assert_quiet_fitting_and_legible(browser: Browser) -> None:
    """The open page says nothing on the console, asks for nothing, has no overflow, and enough contrast (WCAG AA)."""
    assert browser.console() == []
    assert browser.requests() == []
    assert browser.overflow() == 0
    ratio, text = browser.lowest_contrast()
    assert ratio >= 4.5, text
