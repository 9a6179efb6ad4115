"""The target of a step: none if it runs here, or a work pool that the model's hints or the settings name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.models.resources import check_declared
from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.settings import site_settings

STEP = "vllm-step"
"""The flow that is deployed on each pool (`vllm_tasks.pools.step`); the deployment has the pool's name."""

MADE_FOR = "PREFECT__FLOW_RUN_ID"
"""Prefect's environment variable that names the flow run for which a worker has started this process."""


@dataclass(frozen=True)
class Target:
    """A deployment of the thin flow, and what its flow runs need."""

    deployment: UUID
    name: str
    pool: str
    queue: str | None
    job_variables: dict[str, Any]


def target_of(model: VllmAPI | VllmModel) -> Target | None:
    """Find the work pool for the steps of a model.

    Args:
        model: The model, with its hints.

    Returns:
        The deployment to run a step, or None to run it here: no pool is named, or this flow run is on it.

    Raises:
        InvalidCall: The pool or the deployment does not exist, or the pool would drop one of the hints.
    """
    resources = model.resources()
    pool = resources.work_pool or (site_settings().gpu_work_pool if isinstance(model, VllmModel) else "")
    name = resources.deployment or (pool and f"{STEP}/{pool}")
    if not name and resources.work_queue:
        raise InvalidCall(
            f"compute_kwargs has work_queue={resources.work_queue!r} without the work pool of that "
            "queue: give work_pool, too"
        )
    if not name or pool in (own := _own_pools()):
        return None
    deployment, work_pool = within_grace_period(lambda: _found(name, pool))
    if work_pool.name in own:
        return None
    variables = resources.job_variables(work_pool.type)
    check_declared(work_pool, variables)
    return Target(deployment.id, name, work_pool.name, resources.work_queue, variables)


def _own_pools() -> set[str | None]:
    """The pools of the current flow run, and of the run for which a worker has started this process.

    They differ in a subflow, which has no pool of its own.
    """
    context = FlowRunContext.get()
    called_in = context.flow_run.work_pool_name if context and context.flow_run else None
    made_for = os.environ.get(MADE_FOR)
    return {called_in, within_grace_period(lambda: _pool_of(made_for)) if made_for else None}


@cache
def _pool_of(flow_run: str) -> str | None:
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(flow_run)).work_pool_name
        except ObjectNotFound:  # the run is on another Prefect server
            return None


def _found(name: str, pool: str) -> tuple[DeploymentResponse, WorkPool]:
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(name)
        except ObjectNotFound as error:
            raise InvalidCall(
                f"there is no deployment {name!r} on this Prefect server to run the step"
                f"{_way_out(client, pool)}"
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


def _way_out(client: SyncPrefectClient, pool: str) -> str:
    if not pool:
        return ": deploy it, or name a work_pool"
    there = [work_pool.name for work_pool in client.read_work_pools()]
    if pool in there:
        return f", only the work pool {pool!r}: make pools ARGS='--gpu-pool {pool}' adds it"
    return f", nor the work pool{near(pool, there)}: make pools ARGS='--gpu-pool {pool}' makes both"
