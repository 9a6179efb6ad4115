"""A person decides about a model that is below its limits, at a real Prefect server."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from tests.conftest import IN_PREFECT
from tests.events import events_where
from tests.eventually import eventually
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Dataset, GateFailed, InvalidCall, Metric, Validation, VllmAPI
from vllm_tasks._prefect import approval
from vllm_tasks.flows.validate_model import validate_model

pytestmark = IN_PREFECT

BELOW = Validation(
    datasets=[Dataset(identifier="ten", raw_data=[{"q": f"q{i}", "a": "a|b"} for i in range(10)])],
    metrics=[Metric(identifier="exact_match")],
    key=("q", "a"),
    thresholds={"exact_match": 0.5},
)


@pytest.fixture
def model(server: ScriptedServer, tmp_path: Path) -> Iterator[VllmAPI]:
    """A model that is never right."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    with VllmAPI(identifier=name, api_url=server.url, db=str(tmp_path), model="x", retries=0) as model:
        yield model


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval, "POLLED_EVERY", 1)


def paused_run(model: str) -> FlowRun:
    """The flow run that validates a model, once it waits for a person."""
    found: list[FlowRun] = []

    def is_there() -> bool:
        with get_client(sync_client=True) as client:
            named = FlowRunFilter(name={"any_": [f"validate {model}"]}, state={"type": {"any_": ["PAUSED"]}})
            found[:] = client.read_flow_runs(flow_run_filter=named)
        return bool(found)

    assert eventually(is_there)
    return found[0]


class Person(threading.Thread):
    """Waits until the flow run of a model is paused, reads the question and answers it."""

    def __init__(self, model: str, *answers: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.model, self.answers = model, answers
        self.question = ""
        self.accepted: list[SetStateStatus] = []

    def run(self) -> None:
        run = paused_run(self.model)
        assert run.state is not None
        keys = run.state.state_details.run_input_keyset
        assert keys is not None
        with get_client(sync_client=True) as client:
            assert eventually(lambda: self.read(run.id, keys["description"]))
            for answer in self.answers:
                self.accepted.append(client.resume_flow_run(run.id, run_input=answer).status)

    def read(self, run: UUID, key: str) -> bool:
        with get_client(sync_client=True) as client:
            response = client._client.get(f"/flow_runs/{run}/input/{key}")
        if response.status_code == 200:
            self.question = response.json()
        return bool(self.question)


def decided(model: VllmAPI, *answers: dict[str, Any], **options: Any) -> tuple[State[Any], Person]:
    """The state of a flow run that asked, and the person who answered."""
    person = Person(model.identifier, *answers)
    person.start()
    state = validate_model(model, BELOW, on_gate_failed="ask", return_state=True, **options)
    person.join(30)
    assert not person.is_alive()
    return state, person


def test_an_approved_model_completes_the_flow(model: VllmAPI) -> None:
    """The run's message and an event name the person; the question has the reasons and the report's page."""
    with temporary_settings({PREFECT_UI_URL: "http://prefect.example"}):
        state, person = decided(model, {"decision": "approved", "name": "Ada", "comment": "known drift"})
    assert state.is_completed()
    assert "below its threshold of 0.5; approved by Ada: known drift" in (state.message or "")
    assert state.result().metric_values == {"ten": {"exact_match": 0.0}}
    page = f"http://prefect.example/artifacts/key/{model.identifier}-ten-validation"
    assert f"({page})" in person.question
    assert "exact_match is 0 " in person.question
    failed, approved = events_where(2, resource={"id": [f"vllm-tasks.model.{model.identifier}"]})
    assert failed["event"] == "vllm-tasks.validation.failed"
    assert approved["event"] == "vllm-tasks.validation.approved"
    assert approved["payload"]["name"] == "Ada"
    assert approved["payload"]["comment"] == "known drift"


def test_a_rejected_model_fails_the_flow(model: VllmAPI) -> None:
    """The error is that of the gate, and names the person."""
    state, _ = decided(model, {"decision": "rejected", "name": "Ada\n\x1b[31m", "comment": ""})
    with pytest.raises(GateFailed, match=r"below its threshold of 0.5; rejected by Ada") as caught:
        state.result()
    assert str(caught.value).isprintable()
    assert caught.value.report.metric_values == {"ten": {"exact_match": 0.0}}


def test_a_decision_without_a_name_is_no_decision(model: VllmAPI) -> None:
    """The server refuses a form without a name or with another word, and the run goes on waiting."""
    answers = {"decision": "approved"}, {"decision": "maybe", "name": "Ada"}
    state, person = decided(model, *answers, {"decision": "approved", "name": "Ada"})
    assert [status == SetStateStatus.ACCEPT for status in person.accepted] == [False, False, True]
    assert state.is_completed()


def test_without_a_decision_in_time_the_flow_fails(model: VllmAPI) -> None:
    """As without the option, with the time that it waited."""
    with pytest.raises(GateFailed, match=r"below its threshold of 0.5; nobody decided within 2 s"):
        validate_model(model, BELOW, on_gate_failed="ask", approval_timeout=2)


def test_a_model_that_passes_asks_nobody(model: VllmAPI) -> None:
    """The flow completes with its report."""
    within = BELOW.model_copy(update={"thresholds": {}})
    assert validate_model(model, within, on_gate_failed="ask").passed


def test_where_nobody_can_be_asked_the_call_is_refused(model: VllmAPI, server: ScriptedServer) -> None:
    """Called as a plain function, or without a Prefect server that stays; nothing is sent."""
    with pytest.raises(InvalidCall, match=r'set PREFECT_API_URL.*or use on_gate_failed="fail"'):
        validate_model.fn(model, BELOW, on_gate_failed="ask")

    @flow
    def without_a_server() -> None:
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            validate_model.fn(model, BELOW, on_gate_failed="ask")

    with pytest.raises(InvalidCall, match="not a flow run of a Prefect server"):
        without_a_server()
    assert not server.posts
