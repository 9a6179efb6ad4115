"""A person's actions in Prefect's UI, in a real browser: create blocks, start a run, look at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.eventually import LONG_ENOUGH
from tests.servers.browser import SCREENSHOTS, choose_tab, chromium, executable, opened
from tests.servers.scripted_server import ScriptedServer, answer_to
from tests.site import Site
from vllm_tasks import Datalayer

pytestmark = pytest.mark.skipif(executable() is None, reason="needs a browser: apt-get install chromium")

DEPLOYMENT = "batch-predict/api"
WIDTH, HEIGHT = 1400, 1000


@pytest.fixture(scope="module")
def page(site: Site) -> Iterator[Page]:
    """One window for the file."""
    site.put("questions", [{"nr": i, "text": f"t{i}"} for i in range(40)])
    with chromium() as browser, opened(browser, site.url, "light") as page:
        expect.set_options(timeout=LONG_ENOUGH * 1000)
        yield page
        expect.set_options()


@pytest.fixture
def name() -> str:
    """A name that no other test of the session's server uses."""
    return f"test-{uuid4().hex[:12]}"


@pytest.fixture
def clerk(site: Site, server: ScriptedServer, name: str) -> str:
    """The name of a saved model, with tables."""
    lake = {"$ref": {"block_document_id": site.save("vllm-datalayer", name, url=str(site.lake))}}
    site.save("vllm-api", name, identifier=name, api_url=server.url, db=lake)
    return name


def of_block(page: Page, label: str) -> Locator:
    """A field of a block's form, by its title."""
    label = page.locator("label, h3").get_by_text(label, exact=True)
    return page.locator(".p-label, .schema-form-property-any-of").filter(has=label).last


def of_run(page: Page, label: str) -> Locator:
    """A parameter in the form of Custom Run."""
    label = page.locator(".schema-form-property__label").get_by_text(label, exact=True)
    return page.locator(".schema-form-property").filter(has=label).last


def fill(field: Locator, text: str) -> None:
    field.locator("input, textarea").first.fill(text)


def pick(field: Locator, block: str) -> None:
    """Choose a saved block."""
    field.locator(".block-documents-select button").press("ArrowDown")
    field.page.locator(".p-select-option").filter(has_text=block).click()


def press(page: Page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def shot(page: Page, name: str) -> None:
    """A screenshot of all that there is on the page, kept to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    all_of_it = "Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
    page.set_viewport_size({"width": WIDTH, "height": max(page.evaluate(all_of_it), HEIGHT)})
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})


def test_blocks_are_made_by_their_forms(page: Page, site: Site, name: str) -> None:
    """A missing field is reported; an untouched one is not sent, and need not be unset."""
    page.goto(f"{site.url}/blocks/catalog/vllm-datalayer/create")
    fill(of_block(page, "Block Name"), name)
    fill(of_block(page, "URL"), str(site.lake))
    shot(page, "form-datalayer")
    press(page, "Create")
    page.wait_for_url("**/blocks/block/*")

    page.goto(f"{site.url}/blocks/catalog/vllm-api/create")
    fill(of_block(page, "Block Name"), name)
    fill(of_block(page, "URL of the server"), "http://127.0.0.1:1")
    press(page, "Create")
    expect(page.get_by_text("Identifier is required")).to_be_visible()
    fill(of_block(page, "Identifier"), name)
    fill(of_block(page, "Sampling parameters (Optional)"), '{"max_tokens": 5}')
    pick(of_block(page, "Datalayer (Optional)"), name)
    shot(page, "form-vllm-api")
    press(page, "Create")
    page.wait_for_url("**/blocks/block/*")
    saved = site.get(f"/block_types/slug/vllm-api/block_documents/name/{name}")
    given = {"identifier": name, "api_url": "http://127.0.0.1:1", "predict_kwargs": {"max_tokens": 5}}
    switches = {"flatten": False, "messages_as_json": False, "stream": False}  # which a form always sends
    assert {key: value for key, value in saved["data"].items() if key != "db"} == given | switches
    assert saved["block_document_references"]["db"]["block_document"]["name"] == name


def test_the_form_of_a_local_model_begins_with_what_is_needed(page: Page, site: Site, name: str) -> None:
    """Identifier and model come first, and values that nobody fills in come last."""
    page.goto(f"{site.url}/blocks/catalog/vllm-model/create")
    fill(of_block(page, "Block Name"), name)
    titles = [title.removesuffix(" (Optional)") for title in page.locator("label").all_inner_texts()]
    assert titles[:4] == ["Block Name", "Identifier", "Model", "Tensor parallel size"]
    assert titles[-2:] == ["Metric values", "UUID"]
    shot(page, "form-vllm-model")
    fill(of_block(page, "Identifier"), name)
    press(page, "Create")
    page.wait_for_url("**/blocks/block/*")


def submitted(page: Page) -> str:
    """The run that the form creates; if Prefect's SQLite is locked, the form is submitted again."""
    while True:
        with page.expect_response("**/create_flow_run") as answer:
            press(page, "Submit")
        if answer.value.status != 503:
            made: dict[str, Any] = answer.value.json()
            return str(made["id"])


def test_a_run_is_started_by_its_form(page: Page, site: Site, clerk: str) -> None:
    """Wrong values are refused in their fields; the run has its progress, report and outputs."""
    page.goto(f"{site.url}/deployments/deployment/{site.deployment(DEPLOYMENT)['id']}")
    press(page, "Run")
    page.get_by_text("Custom run").click()
    pick(of_run(page, "model"), clerk)
    fill(of_run(page, "X"), "text")
    fill(of_run(page, "primary_id (Optional)"), "nr")
    limit = of_run(page, "limit (Optional)")
    press_in(limit, "int")
    fill(limit, "0")
    press(page, "Submit")
    expect(of_run(page, "select").get_by_text("'select' is a required property")).to_be_visible()
    expect(limit.get_by_text("0 is not valid")).to_be_visible()
    shot(page, "form-batch-predict-refused")
    fill(of_run(page, "select"), "questions")
    fill(limit, "30")
    shot(page, "form-batch-predict")
    run = site.ended(submitted(page))
    assert (run["state_name"], run["name"]) == ("Completed", f"{clerk} - questions")
    outputs = Datalayer(url=str(site.lake)).outputs(clerk).to_pylist()
    assert {row["nr"]: row["output"] for row in outputs} == {i: answer_to(f"t{i}") for i in range(30)}

    for artifact, words in {"progress": "30 of 30 rows done, 0 failed", "report": "No row failed."}.items():
        page.goto(f"{site.url}/runs/flow-run/{run['id']}")
        choose_tab(page, "Artifacts")
        link = page.locator("a[href*='/artifacts/artifact/']").filter(has_text=f"{clerk}-{artifact}")
        link.wait_for()
        shot(page, "run")
        link.click()
        page.wait_for_url("**/artifacts/artifact/*")
        expect(page.get_by_text(words).first).to_be_visible()
        shot(page, artifact)


def press_in(field: Locator, button: str) -> None:
    field.get_by_role("button", name=button, exact=True).click()


def test_a_misspelt_parameter_is_named(page: Page, site: Site, clerk: str) -> None:
    """A name that only vLLM knows to be wrong fails the run before any row, and its page has the reason."""
    wrong = {"sampling": {"max_token": 5}, "primary_id": "nr"}
    block = {"$ref": {"block_document_slug": f"vllm-api/{clerk}"}}
    run = site.start(DEPLOYMENT, model=block, X="text", select="questions", **wrong)
    assert "did you mean 'max_tokens'?" in run["state"]["message"]
    page.goto(f"{site.url}/runs/flow-run/{run['id']}")
    expect(page.get_by_text("did you mean 'max_tokens'?").first).to_be_visible()
    shot(page, "run-refused")
