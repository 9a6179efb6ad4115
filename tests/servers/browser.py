"""Debian's chromium, to look at Prefect's UI."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tests.eventually import LONG_ENOUGH, eventually
from tests.site import REPOSITORY

Theme = Literal["light", "dark"]
SCREENSHOTS = REPOSITORY / "out" / "screenshots"
"""Kept after the run, to look at."""


def executable() -> str | None:
    """The path of chromium, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, theme: Theme) -> Iterator[Page]:
    """A page of the UI in a theme of the UI's own setting, whatever the system prefers."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(LONG_ENOUGH * 1000)
    context.add_init_script(f"localStorage.setItem('color-scheme', JSON.stringify('{theme}'))")
    try:
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def choose_tab(page: Page, name: str) -> None:
    """Click a tab until its panel is visible: before the page is ready, a click does nothing."""

    def chosen() -> bool:
        page.get_by_text(name, exact=True).last.click()
        return page.get_by_role("tabpanel", name=name).is_visible()

    assert eventually(chosen)


def colours(browser: Browser, shown: Locator) -> dict[str, float]:
    """The share of each colour (#rrggbb) in the visible part of an element, from the browser's pixels."""
    data = base64.b64encode(shown.screenshot()).decode()
    page = browser.new_page()
    try:
        shares: dict[str, float] = page.evaluate(COUNT_COLOURS, f"data:image/png;base64,{data}")
    finally:
        page.close()
    return shares


COUNT_COLOURS = """async (source) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
    canvas.drawImage(image, 0, 0);
    const { data } = canvas.getImageData(0, 0, image.width, image.height);
    const shares = {};
    for (let i = 0; i < data.length; i += 4) {
        const colour = "#" + [...data.slice(i, i + 3)].map((v) => v.toString(16).padStart(2, "0")).join("");
        shares[colour] = (shares[colour] ?? 0) + 4 / data.length;
    }
    return shares;
}"""
