"""The screenshots of README and documentation: a nightly flow in Prefect's UI, with a table and a validation.

`make docs-screenshots` writes them into docs/images; otherwise they are in out/screenshots, to look at.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect
from prefect import flow

from tests.conftest import IN_PREFECT
from tests.eventually import LONG_ENOUGH
from tests.servers.browser import SCREENSHOTS, choose_tab, chromium, executable, opened
from tests.servers.scripted_server import Asked, Reply, Script, ScriptedServer, refused, usual
from tests.site import REPOSITORY, spoken_to
from vllm_tasks import Dataset, Metric, Validation, VllmAPI, predict_in_db, validate
from vllm_tasks.validation.run import validate as validate_before

pytestmark = [
    *IN_PREFECT,
    pytest.mark.skipif(executable() is None, reason="needs a browser: apt-get install chromium"),
]

FOLDER = REPOSITORY / "docs" / "images" if os.environ.get("DOCS_SCREENSHOTS") else SCREENSHOTS
TOPICS = "billing", "delivery", "login"
TICKETS = 600
TEXTS = {
    "billing": "I was charged twice for order {i}.",
    "delivery": "Parcel {i} did not arrive.",
    "login": "My account {i} is locked.",
}
VALIDATION = Validation(
    datasets=[
        Dataset(
            identifier="tickets",
            raw_data=[{"text": TEXTS[TOPICS[i % 3]].format(i=i), "topic": TOPICS[i % 3]} for i in range(150)],
        )
    ],
    metrics=[Metric(identifier="accuracy", options={"labels": list(TOPICS)})],
    key=("text", "topic"),
    thresholds={"accuracy": 0.6},
    max_regression={"accuracy": 0.05},
)
PROMPT = "Name the topic of this ticket.\n{input}"


def clerk(right: float, seed: int) -> Script:
    """A model that names the topic of a ticket, so often right, and takes some time for it."""
    chance = random.Random(seed)

    async def answer(asked: Asked) -> Reply | None:
        if asked.path != "/v1/completions":
            return None
        await asyncio.sleep(chance.uniform(0.1, 0.4))
        text = asked.prompt.partition("\n")[2]
        if "Parcel 76 " in text:
            return refused(400, "The prompt was refused by a filter.")
        topic = next(t for t in TOPICS if TEXTS[t].split("{")[0] in text)
        reply = usual(asked)
        said = topic if chance.random() < right else chance.choice(TOPICS)
        reply.body["choices"][0]["text"] = said
        return reply

    return answer


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """Tickets, and five nights of validations before this one."""
    rows = [{"id": i, "text": TEXTS[TOPICS[i % 3]].format(i=i)} for i in range(TICKETS)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for night, right in enumerate((0.72, 0.75, 0.74, 0.8, 0.83)):
        with ScriptedServer(clerk(right, night)) as server:
            model = VllmAPI(identifier="topics", api_url=server.url, prompt=PROMPT, model="scripted-model")
            validate_before(model, VALIDATION, db=str(tmp_path))
    return str(tmp_path)


@flow(name="nightly-tickets")
def nightly(url: str, lake: str) -> None:
    """A table, in groups small enough to see them, and the model's score."""
    model = VllmAPI(identifier="topics", api_url=url, prompt=PROMPT, model="scripted-model", max_in_flight=16)
    predict_in_db(model, "text", "tickets", db=lake, max_chunk_size=100)
    validate(model, VALIDATION, db=lake)


@contextmanager
def browser(ui: str) -> Iterator[Page]:
    with chromium() as browser, opened(browser, ui, "light") as page:
        expect.set_options(timeout=LONG_ENOUGH * 1000)
        yield page
        expect.set_options()


def shot(page: Page, name: str, height: int) -> None:
    page.set_viewport_size({"width": 1400, "height": height})
    page.wait_for_timeout(2000)  # the graph of the run moves to its place
    FOLDER.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=FOLDER / f"{name}.png")


def test_a_run_and_its_validation_are_worth_a_look(ui: str, lake: str) -> None:
    """The run has its progress, commits and artifacts; the validation has its history and its figures."""
    with ScriptedServer(clerk(0.85, 9)) as server, spoken_to(ui):
        nightly(server.url, lake)
    (run,) = httpx.post(
        f"{ui}/api/flow_runs/filter", json={"flows": {"name": {"any_": ["nightly-tickets"]}}}
    ).json()
    # The browser has an event loop of its own in this thread, in which a flow would not run.
    with browser(ui) as page:
        look_at(page, ui, run["id"])


def look_at(page: Page, ui: str, run: str) -> None:
    page.goto(f"{ui}/runs/flow-run/{run}")
    choose_tab(page, "Logs")
    expect(page.get_by_text("of 600 rows done").first).to_be_visible()
    shot(page, "prefect-logs", 1000)
    choose_tab(page, "Artifacts")
    for key in ("topics-progress", "topics-report", "topics-tickets-validation"):
        expect(page.get_by_text(key).first).to_be_visible()
    shot(page, "prefect-run", 1000)

    artifacts = httpx.post(f"{ui}/api/artifacts/filter", json={"sort": "CREATED_DESC"}).json()
    newest = next(a["id"] for a in artifacts if a["key"] == "topics-tickets-validation")
    page.goto(f"{ui}/artifacts/artifact/{newest}")
    page.locator('img[src^="data:image/svg+xml;base64,"]').first.wait_for()
    expect(page.get_by_text("accuracy").first).to_be_visible()
    shot(page, "prefect-validation", 1000)
