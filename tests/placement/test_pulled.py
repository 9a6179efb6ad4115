"""A relative lake is refused in a deployment whose code is pulled, because it is deleted with the run."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from vllm_tasks import Datalayer, InvalidCall
from vllm_tasks.placement.pulled import check_stays
from vllm_tasks.placement.target import MADE_FOR

pytestmark = pytest.mark.usefixtures("prefect_server")

CLONE = {"prefect.deployments.steps.git_clone": {"repository": "https://host/flows.git"}}
IN_PLACE = {"prefect.deployments.steps.set_working_directory": {"directory": "/srv/flows"}}
NOWHERE = {"prefect.deployments.steps.set_working_directory": {"directory": "."}}


@flow
def deployed() -> None:
    """A flow to deploy."""


def started(monkeypatch: pytest.MonkeyPatch, pull_steps: list[dict[str, Any]] | None, **pool: str) -> None:
    """Make this process look like one that a worker started for a flow run of such a deployment."""
    with get_client(sync_client=True) as client:
        steps = client.create_flow(deployed)
        deployment = client.create_deployment(steps, f"d-{uuid4()}", pull_steps=pull_steps, **pool)
        run = client.create_flow_run_from_deployment(deployment)
    monkeypatch.setenv(MADE_FOR, str(run.id))


@pytest.mark.parametrize("url", ["data", "./data/", "sqlite:///x.db"])
def test_a_relative_place_in_pulled_code_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for step, name in ((CLONE, "git_clone"), (NOWHERE, "set_working_directory")):
        started(monkeypatch, [step])
        with pytest.raises(InvalidCall, match=rf"{name}.*deleted with the flow run.*full path"):
            check_stays(Datalayer(url=url))  # type: ignore[arg-type]


def test_a_relative_place_on_a_pool_is_refused_without_pull_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a flow of the installed package: the worker makes a temporary folder for the run."""
    pool = WorkPoolCreate(name=f"pool-{uuid4()}", type="process", base_job_template={})
    with get_client(sync_client=True) as client:
        client.create_work_pool(pool)
    started(monkeypatch, None, work_pool_name=pool.name)
    with pytest.raises(InvalidCall, match=r"no pull step.*deleted with the flow run"):
        check_stays(Datalayer(url="data"))  # type: ignore[arg-type]


def test_what_stays_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full path, a URL, code that is not pulled, and calls outside of deployments are accepted."""
    started(monkeypatch, [CLONE])
    for url in ("/srv/data", "s3://bucket/data", "sqlite:////srv/x.db", "postgresql://host/x"):
        check_stays(Datalayer(url=url))  # type: ignore[arg-type]
    for steps in ([IN_PLACE], [CLONE, IN_PLACE], None):
        started(monkeypatch, steps)
        check_stays(Datalayer(url="data"))  # type: ignore[arg-type]
    monkeypatch.delenv(MADE_FOR)
    check_stays(Datalayer(url="data"))  # type: ignore[arg-type]
