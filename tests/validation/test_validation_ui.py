"""The view of a validation in Prefect's UI, in a real browser."""

from __future__ import annotations

import random
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser

from tests.servers.browser import SCREENSHOTS, Theme, chromium, colours, executable, opened
from tests.servers.scripted_server import Asked, Reply, Script, ScriptedServer, usual
from vllm_tasks import Dataset, Metric, Validation, VllmAPI
from vllm_tasks.validation.comparison import compare
from vllm_tasks.validation.pages import markdown_of, markdown_of_comparison
from vllm_tasks.validation.run import validate

pytestmark = pytest.mark.skipif(executable() is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


CLASSES = "billing", "delivery", "other"
VALIDATION = Validation(
    datasets=[
        Dataset(
            identifier="tickets",
            raw_data=[{"text": f"ticket {i}", "topic": CLASSES[i % 3]} for i in range(60)],
        )
    ],
    metrics=[
        Metric(identifier="accuracy", options={"labels": list(CLASSES)}),
        Metric(identifier="macro_f1", options={"labels": list(CLASSES)}),
        Metric(identifier="output_tokens"),
    ],
    key=("text", "topic"),
    thresholds={"accuracy": 0.3},
    max_regression={"accuracy": 0.05},
)


def clerk(right: float, seed: int) -> Script:
    """A model that names the topic of a ticket, rightly at a given rate."""
    chance = random.Random(seed)

    def answer(asked: Asked) -> Reply | None:
        if asked.path != "/v1/completions":
            return None
        topic = CLASSES[int(asked.prompt.split()[-1]) % 3]
        text = topic if chance.random() < right else chance.choice(("delivery", "<b>no</b> idea | `really`"))
        reply = usual(asked)
        reply.body["choices"][0]["text"] = text
        reply.body["usage"]["completion_tokens"] = chance.randint(2, 9)
        return reply

    return answer


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a model that got worse after some runs, and of its comparison with another one."""
    lake = tmp_path_factory.mktemp("lake")
    for night, right in enumerate((0.8, 0.85, 0.8, 0.9, 0.82, 0.4)):
        with ScriptedServer(clerk(right, night)) as server:
            model = VllmAPI(identifier="clerk", api_url=server.url, chat=False)
            found = validate(model, VALIDATION, db=str(lake))
    with ScriptedServer(clerk(0.7, 99)) as server:
        other = VllmAPI(identifier="another-clerk", api_url=server.url, model="other", chat=False)
        others = validate(other, VALIDATION, db=str(lake))
    models = [model.model_copy(update={"model": "scripted-model"}), other]
    comparison = compare(models, VALIDATION, [found, others], db=str(lake))
    return markdown_of("clerk", found.datasets[0]) + markdown_of_comparison(comparison)


@pytest.fixture(scope="module")
def artifact(ui: str, report: str) -> str:
    """The id of the report on the server.

    It is sent without Prefect's client, whose threads in this process would keep calling an ended server.
    """
    artifact = {"key": "validation-picture", "type": "markdown", "data": report}
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

        assert pictures.count() == 4, "the history, and the models by each of three metrics"
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
        assert page.get_by_text("<b>no</b> idea").first.is_visible(), "what the model said is text"
        page.screenshot(path=SCREENSHOTS / f"validation-{theme}.png")
