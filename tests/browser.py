"""A real Prefect server with its UI, and Debian's chromium to look at it."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, Locator, Page, sync_playwright

Theme = Literal["light", "dark"]
SCREENSHOTS = Path(__file__).parent.parent / "out" / "screenshots"
"""Kept after the run, to look at."""
PATIENCE = 60.0
"""Seconds that a server may take to start, or the UI to show something."""


def executable() -> str | None:
    """Where chromium is, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def prefect_with_ui() -> Iterator[str]:
    """The URL of a Prefect server of its own: the one of `prefect_test_harness` serves no UI."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="vllm-tasks-ui-", ignore_cleanup_errors=True) as home:
        settings = {
            "PREFECT_HOME": home,
            "PREFECT_UI_API_URL": f"{url}/api",
            "PREFECT_UI_STATIC_DIRECTORY": f"{home}/ui",  # else it is written beside the package
            "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
        log = Path(home, "log")
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--no-services"], env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            _wait_until_healthy(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/api/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"no Prefect server at {url}: {log.read_text()[-2000:]}")


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
    """A page of the UI in a theme: the UI takes it from its own setting, whatever the system prefers."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    context.add_init_script(f"localStorage.setItem('color-scheme', JSON.stringify('{theme}'))")
    try:
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def colours(browser: Browser, shown: Locator) -> dict[str, float]:
    """The share of each colour (#rrggbb) in what is seen of an element: the browser reads the pixels."""
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
