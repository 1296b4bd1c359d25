"""A real Chromium without a window, driven through selenium; where there is none, its tests skip and say why."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--force-device-scale-factor=1", "--disable-background-networking"),
)

CONTRAST = """
const brush = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const parse = (c) => {
  brush.clearRect(0, 0, 1, 1); brush.fillStyle = c; brush.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = (c) => [.2126, .7152, .0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
const ground = (node) => {
  if (!node) return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  const own = parse(getComputedStyle(node).backgroundColor);
  return own[3] > .99 ? own : over(own, ground(node.parentElement));
};
const out = [];
for (const node of document.querySelectorAll("body *")) {
  const said = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(" ").trim();
  if (!said || !node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled, noscript")) continue;
  const paper = ground(node), mixed = over(parse(getComputedStyle(node).color), paper);
  const [a, b] = [light(mixed), light(paper)].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < arguments[0]) out.push([said.slice(0, 40), (a + .05) / (b + .05)]);
}
return out;
"""
"""Texts whose contrast to what they stand on is lower than the first argument."""

OVERFLOW = """
const wide = document.documentElement.clientWidth;
const inside = (n) => n.closest(".scroll, .talk, .skip, .hidden, td.map, .map");
return [...document.querySelectorAll("body *")].filter((n) => n.checkVisibility() && !inside(n))
  .filter((n) => n.getBoundingClientRect().right > wide + .5).map((n) => n.outerHTML.slice(0, 80))
  .concat(document.documentElement.scrollWidth > wide ? ["the page scrolls sideways"] : []);
"""
"""What sticks out of the page, but for what scrolls by itself."""


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser; skips where selenium, Chromium or its driver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs a browser: Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        made.set_script_timeout(20)
        yield made
    finally:
        made.quit()


def screen(
    browser: Any, wide: int, high: int = 900, *, dark: bool = False, still: bool = False
) -> None:
    """The size of the page and what its owner prefers."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": wide, "height": high, "deviceScaleFactor": 1, "mobile": wide < 600},
    )
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def photograph(browser: Any, path: Path) -> None:
    """The whole page as a PNG."""
    high = browser.execute_script("return document.documentElement.scrollHeight")
    wide = browser.execute_script("return document.documentElement.clientWidth")
    clip = {"x": 0, "y": 0, "width": wide, "height": high, "scale": 1}
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(shot["data"]))
