"""Where a step runs: here, or as a flow run on the work pool that the model's hints or the settings name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from vllm_tasks.errors import InvalidCall
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.resources import Resources, check_declared
from vllm_tasks.settings import site_settings

STEP = "vllm-step"
"""The flow that is deployed on each pool (see `vllm_tasks.steps`); the deployment has the pool's name."""


@dataclass(frozen=True)
class Place:
    """A deployment of the thin flow, and what its flow runs need."""

    deployment: UUID
    name: str
    pool: str
    queue: str | None
    job_variables: dict[str, Any]


def place_of(model: VllmAPI | VllmModel) -> Place | None:
    """Where a step with `model` goes, None for here; also where this flow run is on that pool already.

    Raises `InvalidCall` for a pool or deployment that is not there, and for hints that the pool would drop.
    """
    resources = Resources.of(model)
    pool = resources.work_pool or (site_settings().gpu_work_pool if isinstance(model, VllmModel) else "")
    name = resources.deployment or (pool and f"{STEP}/{pool}")
    if not name or pool == _own_pool():
        return None
    deployment, work_pool = _found(name, pool)
    if work_pool.name == _own_pool():
        return None
    variables = resources.job_variables(work_pool.type)
    check_declared(work_pool, variables)
    return Place(deployment.id, name, work_pool.name, resources.work_queue, variables)


def _own_pool() -> str | None:
    """The pool of the flow run that this is called in."""
    context = FlowRunContext.get()
    return context.flow_run.work_pool_name if context and context.flow_run else None


def _found(name: str, pool: str) -> tuple[DeploymentResponse, WorkPool]:
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(name)
        except ObjectNotFound as error:
            way_out = f"make pools ARGS='--gpu-pool {pool}'" if pool else "deploy it, or name a work_pool"
            raise InvalidCall(
                f"there is no deployment {name!r} on this Prefect server to run the step: {way_out}"
            ) from error
        if not deployment.work_pool_name:
            raise InvalidCall(
                f"the deployment {name!r} has no work pool (it is served): deploy {STEP} to a work pool"
            )
        if pool and deployment.work_pool_name != pool:
            raise InvalidCall(
                f"the deployment {name!r} is on the pool {deployment.work_pool_name!r}, not on {pool!r} as "
                "the hint work_pool says; leave one of them out"
            )
        return deployment, client.read_work_pool(deployment.work_pool_name)
