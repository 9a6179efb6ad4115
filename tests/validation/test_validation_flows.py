"""The deployable flows that validate and compare models."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from prefect import get_client

from tests.conftest import IN_PREFECT
from tests.served import run_when_served
from tests.servers.scripted_server import ScriptedServer
from tests.validation.quiz import SVG, artifact, events_of, history, loaded, of, right_of, said, saved
from vllm_tasks import Datalayer, InvalidCall, VllmAPI
from vllm_tasks.artifacts import slug
from vllm_tasks.flows.compare_models import compare_models
from vllm_tasks.flows.validate_model import validate_model
from vllm_tasks.results import Comparison

pytestmark = IN_PREFECT


ACCEPTED = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(10)]


FORM: dict[str, Any] = {
    "datasets": [
        {"identifier": "first", "raw_data": ACCEPTED, "sample_size": 10},
        {"identifier": "second", "raw_data": ACCEPTED[:5]},
    ],
    "metrics": [{"identifier": "exact_match"}, {"identifier": "right", "object": "flows.demo.is_right"}],
    "key": ["question", "answer"],
    "thresholds": {"first/exact_match": 0.75},
}
"""A validation as JSON, as a form or the API gives it."""


def test_the_flow_validates_a_saved_model_when_served(
    server: ScriptedServer, lake: Datalayer, name: str
) -> None:
    """A run from a form, with a saved block and a validation in JSON, has two data sets and one event."""
    server.script = said(right_of(8))
    saved(name, server, lake)
    with get_client(sync_client=True) as client:
        block = client.read_block_document_by_name(name, "vllm-api").id
    form = {"model": {"$ref": {"block_document_id": str(block)}}, "validation": FORM}
    run = run_when_served("validate_model", form)
    assert run.name == f"validate {name}"
    assert loaded(name).metric_values == {
        "first": {"exact_match": 0.8, "right": 0.8},
        "second": {"exact_match": 1.0, "right": 1.0},
    }
    assert {row["flow_run"] for row in history(lake)} == {str(run.id)}
    (event,) = events_of(name, 1)
    assert event["event"] == "vllm-tasks.validation.passed"
    assert event["payload"]["metric_values"].keys() == {"first", "second"}


def test_the_flow_fails_with_the_reasons_of_all_data_sets(model: VllmAPI, lake: Datalayer) -> None:
    """All are recorded; one event reports the failure, although one data set passed."""
    limits = {"a/exact_match": 0.9, "b/exact_match": 0.85, "c/exact_match": 0.5}
    state = validate_model(model, of("a", "b", "c", thresholds=limits), return_state=True)
    assert state.is_failed()
    for words in ("a: exact_match is 0.8", "b: exact_match is 0.8"):
        assert words in (state.message or "")
    assert {row["dataset"]: row["passed"] for row in history(lake)} == {"a": False, "b": False, "c": True}
    (event,) = events_of(model.identifier, 1)
    assert event["event"] == "vllm-tasks.validation.failed"
    assert len(event["payload"]["reasons"]) == 2


def test_the_flow_needs_a_validation(model: VllmAPI) -> None:
    """The validation is given or saved with the model."""
    with pytest.raises(InvalidCall, match="has no validation: give one"):
        validate_model(model)


def test_models_are_compared_row_by_row(server: ScriptedServer, lake: Datalayer, name: str) -> None:
    """Each model is compared with the first, by parameters in JSON; one below its limit fails nothing."""
    server.script = lambda asked: said(right_of(9 if (asked.body or {}).get("model") == "big" else 5))(asked)
    big, small = ({"identifier": f"{name}-{m}", "api_url": server.url, "model": m} for m in ("big", "small"))
    comparison = compare_models([big, small], FORM, db={"url": lake.url.get_secret_value()})
    assert isinstance(comparison, Comparison)
    assert comparison.models == (f"{name}-big", f"{name}-small")
    by = {(s.dataset, s.metric, s.model): s for s in comparison.standings}
    assert len(by) == 8
    assert by["first", "exact_match", f"{name}-big"].paired is None
    second = by["first", "exact_match", f"{name}-small"]
    assert second.value.value == 0.5
    assert second.paired is not None
    assert second.paired.difference == pytest.approx(-0.4)
    page = str(artifact(slug("comparison", *comparison.models)).data)
    assert f"against {name}-big" in page
    assert "-0.4 (" in page
    pictures = SVG.findall(page)
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture))
    (event,) = events_of(f"{name}-small", 1)
    assert event["event"] == "vllm-tasks.validation.failed"


def test_models_to_compare_are_told_apart_before_they_are_asked(
    model: VllmAPI, server: ScriptedServer
) -> None:
    """Two models of one identifier would overwrite each other's answers."""
    with pytest.raises(InvalidCall, match="need identifiers of their own"):
        compare_models([model, model.model_copy()], of())
    assert not server.posts


@pytest.mark.parametrize(
    ("deployed", "required"), [(validate_model, ["model"]), (compare_models, ["models", "validation"])]
)
def test_the_deployable_flows_have_good_forms(deployed: Any, required: list[str]) -> None:
    """Every parameter and every field of a validation has a description, and models are picked as blocks."""
    schema = deployed.parameters
    assert schema.required == required
    assert not [name for name, p in schema.properties.items() if not p.get("description")]
    slugs = {d.get("block_type_slug") for d in schema.definitions.values()}
    assert {"vllm-api", "vllm-model", "vllm-datalayer"} <= slugs
    for part in ("Validation", "Dataset", "Metric"):
        fields = schema.definitions[part]["properties"]
        assert not [name for name, p in fields.items() if not p.get("description")], part
