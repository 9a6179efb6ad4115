"""The deployments of `prefect.yaml`, on a real server with a worker: schedules, triggers, and no loop."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.events import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint

from tests.conftest import TINY_ARGS
from tests.servers.scripted_server import ScriptedServer, answer_to
from tests.site import REPOSITORY, Site
from vllm_tasks import Datalayer, Validation

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
ROWS = [{"id": i, "text": f"t{i}"} for i in range(20)]
HELD_OUT = [{"question": f"q{i}", "answer": f" q{i}!"} for i in range(500)]


def flow_of(deployment: dict[str, Any]) -> str:
    return load_flow_from_entrypoint(deployment["entrypoint"]).name


NAMES = [f"{flow_of(deployment)}/{deployment['name']}" for deployment in DEPLOYMENTS]


# ---------------------------------------------------------------------- the file


def test_every_start_has_the_parameters_of_its_flow() -> None:
    """The flow has all parameters of schedules and triggers, and none of its required ones is missing."""
    for deployment in DEPLOYMENTS:
        schema = load_flow_from_entrypoint(deployment["entrypoint"]).parameters
        for start in [*deployment.get("schedules", []), *deployment.get("triggers", [])]:
            given = deployment.get("parameters", {}) | start["parameters"]
            assert set(schema.required) <= given.keys() <= schema.properties.keys()
            if "validation" in given:
                Validation(**given["validation"])


def started_by(trigger: DeploymentEventTrigger) -> str | None:
    """The deployment whose runs a trigger waits for; None for an event from elsewhere."""
    if not any(event.startswith(("prefect.", "vllm-tasks.validation.")) for event in trigger.expect):
        return None
    related = [r.model_dump() for r in trigger.match_related]  # type: ignore[union-attr]
    by = {r["prefect.resource.role"]: r["prefect.resource.name"] for r in related}
    return f"{by['flow']}/{by['deployment']}"


def test_no_run_starts_itself_again() -> None:
    """Each trigger waits for one named deployment, or for an outside event; no chain leads back."""
    starts = {
        name: started_by(DeploymentEventTrigger.model_validate(trigger))
        for name, deployment in zip(NAMES, DEPLOYMENTS, strict=True)
        for trigger in deployment.get("triggers", [])
    }
    assert {"batch-predict/gpu": "validate-model/gpu", "validate-model/api": "batch-predict/api"}.items() <= (
        starts.items()
    )
    for name in starts:
        way = [name]
        while (before := starts.get(way[-1])) is not None:
            assert before not in way
            way.append(before)


# ---------------------------------------------------------------------- the server


def test_one_command_deploys_them_all(site: Site) -> None:
    """Each has its pool, checks its parameters, runs one at a time, and is scheduled in a time zone."""
    for name, wanted in zip(NAMES, DEPLOYMENTS, strict=True):
        there = site.deployment(name)
        assert there["work_pool_name"] == wanted["work_pool"]["name"]
        assert there["enforce_parameter_schema"]
        assert there["global_concurrency_limit"]["limit"] == 1
        assert there["concurrency_options"]["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")
        assert (there["description"], there["tags"]) == (wanted["description"], wanted["tags"])
        schedules = {s["slug"]: s for s in there["schedules"]}
        assert schedules.keys() == {s["slug"] for s in wanted.get("schedules", [])}
        for schedule in wanted.get("schedules", []):
            made = schedules[schedule["slug"]]
            assert made["parameters"] == schedule["parameters"]
            assert made["schedule"]["timezone"] == "Europe/Berlin"
    for pool in ("vllm", "vllm-gpu"):
        assert site.get(f"/work_pools/{pool}")["type"] == "process"


@pytest.fixture(scope="module")
def api() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="module")
def lake(site: Site) -> dict[str, Any]:
    """The tables that the deployments read, as a reference to a block."""
    site.put("tickets", ROWS)
    site.put("held_out", HELD_OUT)
    return {"$ref": {"block_document_id": site.save("vllm-datalayer", "lake", url=str(site.lake))}}


@pytest.fixture(scope="module")
def llama(site: Site, api: ScriptedServer, lake: dict[str, Any]) -> None:
    """The model that the deployments name."""
    site.save("vllm-api", "llama", identifier="llama", api_url=api.url, db=lake)


@pytest.mark.usefixtures("llama")
def test_new_data_are_answered_and_then_the_model_is_validated(site: Site) -> None:
    """An event starts batch-predict, its completion validate-model, and that of the latter nothing.

    The trigger of the validation is disabled until its table exists.
    """
    (trigger,) = [
        each
        for each in site.post("/automations/filter", {})
        if each["name"] == "validate the model that has processed the tickets"
    ]
    assert not trigger["enabled"]
    site.ask("PATCH", f"/automations/{trigger['id']}", {"enabled": True})
    predict, validate = "batch-predict/api", "validate-model/api"
    before = {run["id"] for run in [*site.runs(predict), *site.runs(validate)]}

    def started(deployment: str) -> list[dict[str, Any]]:
        return [run for run in site.runs(deployment) if run["id"] not in before]

    site.command(
        "-m", "prefect", "event", "emit", "vllm-tasks.data.arrived",
        "--resource-id", "vllm-tasks.table.tickets",
    )  # fmt: skip
    site.wait_until(lambda: started(predict))
    predicted = site.ended(started(predict)[0]["id"])
    assert (predicted["state_name"], predicted["name"]) == ("Completed", "llama - tickets")
    answers = Datalayer(url=str(site.lake)).outputs("llama").to_pylist()
    assert {row["id"]: row["output"] for row in answers} == {i: answer_to(f"t{i}") for i in range(20)}
    site.wait_until(lambda: started(validate))
    validated = site.ended(started(validate)[0]["id"])
    assert validated["state_name"] == "Completed", validated["state"]["message"]
    assert validated["created_by"]["type"] == "AUTOMATION"
    assert len(started(predict)) == len(started(validate)) == 1


def test_a_model_that_passed_on_gpus_answers_there(site: Site) -> None:
    """Only a passed validate-model/gpu starts batch-predict/gpu, on its own pool."""
    for deployment in ("api", "gpu"):
        verdict = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "vllm-tasks.validation.passed",
            "resource": {"prefect.resource.id": "vllm-tasks.model.llama-local"},
            "related": [related("flow", "validate-model"), related("deployment", deployment)],
        }
        site.post("/events", [verdict])
    site.wait_until(lambda: site.runs("batch-predict/gpu"))
    (run,) = site.runs("batch-predict/gpu")
    assert run["work_pool_name"] == "vllm-gpu"
    assert run["parameters"]["model"] == {"$ref": {"block_document_slug": "vllm-model/llama-local"}}


def related(role: str, name: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"prefect.{role}.{uuid4()}",
        "prefect.resource.role": role,
        "prefect.resource.name": name,
    }


def test_a_block_that_is_not_there_is_named(site: Site) -> None:
    """A run with a model that is not saved fails at once, and its log names the model."""
    absent = {"$ref": {"block_document_slug": "vllm-model/llama-local"}}
    run = site.start("batch-predict/api", model=absent, X="text", select="tickets")
    assert "Failed to resolve block references in parameters" in run["state"]["message"]
    of = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    site.wait_until(lambda: "llama-local" in str(site.post("/logs/filter", of)))


@pytest.mark.engine
@pytest.mark.long
def test_a_scheduled_run_answers_with_real_vllm(site: Site, lake: dict[str, Any], tiny_model: Path) -> None:
    """A schedule has parameters of its own: here a model that runs where the worker is."""
    engine = {"model_name": str(tiny_model), "vllm_kwargs": TINY_ARGS, "predict_kwargs": {"max_tokens": 4}}
    site.save("vllm-model", "tiny", identifier="tiny", db=lake, **engine)
    given = {"model": {"$ref": {"block_document_slug": "vllm-model/tiny"}}, "X": "text", "select": "tickets"}
    path = f"/deployments/{site.deployment('batch-predict/api')['id']}/schedules"
    often = {"schedule": {"interval": 15}, "active": True, "parameters": given}
    (schedule,) = site.post(path, [often])

    def runs() -> list[dict[str, Any]]:
        return [run for run in site.runs("batch-predict/api") if run["name"] == "tiny - tickets"]

    site.wait_until(runs)
    site.ask("DELETE", f"{path}/{schedule['id']}")
    site.wait_until(lambda: runs()[0]["end_time"])
    (run,) = runs()
    assert (run["auto_scheduled"], run["state_name"]) == (True, "Completed")
    assert len(Datalayer(url=str(site.lake)).outputs("tiny")) == len(ROWS)
