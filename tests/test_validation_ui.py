"""What a person sees of a validation in Prefect's UI, in a real browser."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from playwright.sync_api import Browser

from tests.browser import SCREENSHOTS, Theme, chromium, colours, executable, opened, prefect_with_ui
from vllm_tasks.validation.picture import Panel, Point, Row, compare_svg, histories_svg, markdown_image

pytestmark = pytest.mark.skipif(executable() is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def ui() -> Iterator[str]:
    """The URL of a server with a UI."""
    with prefect_with_ui() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def points(count: int, base: float, spread: float, threshold: float | None = None) -> list[Point]:
    """A metric over the runs of some weeks."""
    chance = random.Random(count)
    began = datetime(2026, 9, 3, 14, 5, tzinfo=UTC)
    values = [base + chance.gauss(0, spread) for _ in range(count)]
    return [
        Point(began + timedelta(days=3 * i), v, v - 2 * spread, v + 2 * spread, "", v >= (threshold or v))
        for i, v in enumerate(values)
    ]


def report() -> str:
    """A report with a picture of three metrics, and one of two models."""
    history = histories_svg(
        [
            Panel("gsm8k / exact_match", points(12, 0.547, 0.02, 0.53), threshold=0.53),
            Panel("gsm8k / perplexity", points(12, 23.4, 1.1), higher_is_better=False),
            Panel("summaries / rougeL", points(12, 0.31, 0.01)),
        ]
    )
    models = compare_svg(
        [
            Row("meta-llama/Llama-3.1-8B-Instruct", 0.547, 0.520, 0.574, True),
            Row("Qwen/Qwen2.5-0.5B-Instruct", 0.342, 0.316, 0.368, False),
        ],
        title="gsm8k / exact_match",
        threshold=0.53,
    )
    shown = f"# Validation\n\nIt passed.\n\n{markdown_image(history, 'History')}\n\n"
    return shown + f"## Models\n\n{markdown_image(models, 'Models')}\n"


@pytest.fixture(scope="module")
def artifact(ui: str) -> str:
    """The id of the report on the server.

    Sent without Prefect's client: its threads in this process would go on talking to a server that is gone.
    """
    artifact = {"key": "validation-picture", "type": "markdown", "data": report()}
    return httpx.post(f"{ui}/api/artifacts/", json=artifact).raise_for_status().json()["id"]


CARD: dict[Theme, str] = {"light": "#ffffff", "dark": "#1b1d23"}


@pytest.mark.parametrize("theme", CARD)
def test_the_ui_shows_pictures_of_a_validation(
    ui: str, artifact: str, browser: Browser, theme: Theme
) -> None:
    """The pictures are on the artifact's page, in the page's theme, in the size they were drawn for."""
    with opened(browser, f"{ui}/artifacts/artifact/{artifact}", theme) as page:
        pictures = page.locator('img[src^="data:image/svg+xml;base64,"]')
        pictures.last.wait_for()

        assert pictures.count() == 2
        assert page.locator("html").evaluate("(e, theme) => e.classList.contains(theme)", theme)
        for i, name in enumerate(("history", "models")):
            picture = pictures.nth(i)
            assert picture.is_visible()
            assert picture.evaluate("i => i.naturalWidth") == 720
            box = picture.bounding_box()
            assert box is not None
            assert box["width"] > 500
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            picture.screenshot(path=SCREENSHOTS / f"validation-{name}-{theme}.png")
            seen = colours(browser, picture)
            assert len(seen) > 50, "the picture is not blank"
            assert seen[CARD[theme]] > 0.5, "the card has the theme's colour"
        page.screenshot(path=SCREENSHOTS / f"validation-{theme}.png")
