"""The dashboard in a real browser: what it shows, by keyboard, in light and dark, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CONTRAST, OVERFLOW, browsing, screen
from served import wait_for


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as made:
        yield made


def value(browser: Any, script: str, *arguments: Any) -> Any:
    return browser.execute_script(f"return {script}", *arguments)


def shown(browser: Any, name: str) -> str:
    text: str = value(browser, "document.getElementById(arguments[0]).innerText", name)
    return text


def focused(browser: Any) -> str:
    return str(value(browser, "document.activeElement.id || document.activeElement.className"))


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def is_live(browser: Any) -> None:
    wait_for(lambda: shown(browser, "status") == "live")


def complaints(browser: Any) -> list[str]:
    """What the browser's console says, but for the refusal that asks for a key."""
    found = [entry["message"] for entry in browser.get_log("browser")]
    return [message for message in found if "401" not in message]


def test_the_page_is_live_and_talks(packaged: Any, browser: Any) -> None:
    from selenium.webdriver import Keys

    screen(browser, 1280)
    browser.get(f"{packaged.url}/")
    is_live(browser)
    assert "packaged" in shown(browser, "model")
    assert value(browser, "document.title") == "Quire · packaged"
    browser.find_element("id", "text").send_keys("<b>Alice</b> was beginning to get very tired of")
    press(browser, Keys.ENTER)
    wait_for(lambda: "prompt tokens found" in shown(browser, "talk"))
    assert "<b>Alice</b>" in shown(browser, "talk")
    assert value(browser, "document.querySelectorAll('#talk b').length") == 0
    assert shown(browser, "send") == "Send"
    wait_for(lambda: "Alice" in shown(browser, "tree"))
    assert value(browser, "document.querySelectorAll('#tree b, #tree script').length") == 0
    wait_for(lambda: shown(browser, "first").endswith("s"))
    assert "cached" in shown(browser, "legend")
    assert "cached" in value(browser, "document.getElementById('map').getAttribute('aria-label')")
    colours = value(
        browser,
        "(() => { const c = document.getElementById('map'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; const s = new Set(); for (let i = 0; i < d.length; i += 4)"
        " if (d[i + 3] === 255) s.add([d[i], d[i + 1], d[i + 2]].join()); return s.size })()",
    )
    assert colours >= 2, "cached and free blocks are drawn alike"
    assert not complaints(browser)


def test_it_looks_right_on_every_screen(packaged: Any, browser: Any) -> None:
    """No text too faint, nothing that sticks out."""
    packaged.client().completions.create(
        model="packaged", prompt="import os, sys\n" * 8, max_tokens=4
    )
    browser.get(f"{packaged.url}/")
    is_live(browser)
    for wide in (1280, 400):
        for dark in (False, True):
            screen(browser, wide, dark=dark)
            assert value(browser, "innerWidth") == wide
            assert browser.execute_script(CONTRAST, 4.5) == []
            assert browser.execute_script(OVERFLOW) == []
    screen(browser, 1280, still=True)
    moving = (
        "[...document.querySelectorAll('*')]"
        ".filter(n => parseFloat(getComputedStyle(n).transitionDuration)).length"
    )
    assert value(browser, moving) == 0
    screen(browser, 1280)
    assert value(browser, moving) > 0, "the test shows nothing"


def test_it_is_used_by_keyboard(packaged: Any, browser: Any) -> None:
    """Tab reaches what can be used, in the order of the page, and everything has a name."""
    from selenium.webdriver import Keys

    screen(browser, 1280)
    browser.get(f"{packaged.url}/")
    is_live(browser)
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(focused(browser))
    assert reached[0] == "skip"
    for earlier, later in (
        ("skip", "clear"),
        ("clear", "talk"),
        ("talk", "text"),
        ("text", "most"),
    ):
        assert reached.index(earlier) < reached.index(later)
    unnamed = (
        "[...document.querySelectorAll('button, input, select, textarea, [role=region], [role=img], [tabindex]')]"
        ".filter(n => n.checkVisibility() && !(n.ariaLabel || n.labels?.length || n.innerText || "
        "n.getAttribute('aria-labelledby'))).map(n => n.id)"
    )
    assert value(browser, unnamed) == []
    assert value(browser, "document.documentElement.lang") == "en"
    for landmark in ("main", "header", "h1"):
        assert value(browser, f"document.querySelectorAll('{landmark}').length") == 1


def test_a_key_is_asked_for_and_stays_in_the_tab(keyed: Any, browser: Any) -> None:
    keyed.client("alice").completions.create(model="tiny", prompt="<i>x</i> " * 12, max_tokens=2)
    browser.get(f"{keyed.url}/")
    wait_for(lambda: value(browser, "document.getElementById('key-dialog').open"))
    assert focused(browser) == "key"
    press(browser, "not-a-key-that-is-known", "\n")
    wait_for(lambda: "not known" in shown(browser, "key-why"))
    press(browser, keyed.keys["alice"], "\n")
    is_live(browser)
    assert "key alice" in shown(browser, "model")
    assert value(browser, "document.getElementById('memory').hidden")
    assert shown(browser, "tenants").split()[0] == "alice"
    assert value(browser, "sessionStorage.getItem('quire.key')") == keyed.keys["alice"]
    assert value(browser, "localStorage.length + document.cookie.length") == 0
    assert keyed.keys["alice"] not in value(browser, "location.href + document.body.innerHTML")
    browser.find_element("id", "key-button").click()
    assert value(browser, "sessionStorage.length") == 0
    assert value(browser, "document.getElementById('key-dialog').open")
    assert not complaints(browser)


def test_a_closed_tab_ends_its_stream(packaged: Any, browser: Any) -> None:
    browser.get(f"{packaged.url}/")
    is_live(browser)
    assert packaged.service.watch._seats
    browser.get("about:blank")
    wait_for(lambda: not packaged.service.watch._seats)


def test_the_page_of_an_attention_is_legible(browser: Any, tmp_path: Path) -> None:
    """`quire inspect --attention … --html`: what it shades most, on every screen."""
    from quire.cli.inspect import _page

    words = ["<s>", "a", "<b>", "↵", *(f" word{i}" for i in range(60))]
    n = len(words)
    reads = [1 / (1 + i) for i in range(n)]
    head = {
        "received": reads,
        "heavy_share": 0.5,
        "sinks": [0],
        "reads": [x / sum(reads) for x in reads],
    }
    document = {
        "model": "tiny & small",
        "kv": "fp32",
        "tokens": [{"position": i, "text": w} for i, w in enumerate(words)],
        "chosen": n - 1,
        "heads": [{"layer": i // 4, "head": i % 4, **head} for i in range(8)],
    }
    page = tmp_path / "page.html"
    page.write_text(_page(document), encoding="utf-8")
    browser.get(page.as_uri())
    for wide in (1280, 400):
        for dark in (False, True):
            screen(browser, wide, dark=dark)
            assert browser.execute_script(CONTRAST, 4.5) == []
            assert browser.execute_script(OVERFLOW) == []
    assert value(browser, "document.querySelectorAll('b').length") == 0
    left = "[...document.querySelectorAll('.map')].map(n => n.getBoundingClientRect().left)"
    assert len(set(value(browser, left))) == 2, "a strip does not stand below its heading"
