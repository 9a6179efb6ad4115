"""Work pools for models, with their limits, deployments and automations; one call makes or updates them.

`python -m vllm_tasks.pools` makes a pool for servers and CPUs, and one for GPUs. Each has the deployment of
the step that routed models run in, and an automation that ends runs whose process died. The pool for GPUs
also has a limit with one slot per GPU. A second call finds all of them by their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Any, Literal, TypeVar, get_args

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.pools import step as steps

T = TypeVar("T")

PoolType = Literal["process", "docker", "kubernetes"]
POOL_TYPES: tuple[PoolType, ...] = get_args(PoolType)

BLOCKS = (Datalayer, VllmAPI, VllmModel)

ODD = "/%&><"
"""Characters that Prefect allows in no name."""

DEAD_AFTER = timedelta(seconds=90)
"""Three heartbeats of the 30 s that the pools' templates set."""

TAG = "vllm-tasks"


@dataclass(frozen=True)
class Pool:
    """A pool to be made. `gpus` is the number of slots of its limit; with None it has no limit."""

    name: str
    type: PoolType
    gpus: int | None = None
    image: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or set(ODD) & set(self.name) or self.name.lower().startswith("prefect"):
            raise InvalidCall(
                f"{self.name!r:.200} cannot name a work pool: it must not be empty, begin with 'prefect', or "
                f"contain any of {ODD}; give another name"
            )
        if self.image and self.type == "process":
            raise InvalidCall(
                f"the pool {self.name!r} of type 'process' starts no images, and got {self.image!r}; choose "
                "the type docker or kubernetes, or leave out the image"
            )

    @property
    def limit(self) -> str:
        """The name of the global concurrency limit with one slot for each GPU of the pool."""
        return f"vllm-gpus:{self.name}"


def make(*pools: Pool, change_slots: bool = False) -> list[str]:
    """Make the pools or bring them up to date. A second call changes nothing.

    Defaults that others have set for a pool stay.

    Args:
        *pools: The pools.
        change_slots: Also change the number of slots of a limit that exists.

    Returns:
        Lines of text that list what exists now.

    Raises:
        InvalidCall: A pool exists with another type.
    """
    for block in BLOCKS:
        block.register_type_and_schema()
    lines = [f"block types {', '.join(block.get_block_type_slug() for block in BLOCKS)}"]
    with get_client(sync_client=True) as client:
        for pool in pools:
            _made(partial(_make_pool, client, pool))
            lines.append(f"work pool {pool.name!r}, type {pool.type}")
            if pool.gpus is not None:
                slots = _made(partial(_make_limit, client, pool.limit, pool.gpus, change_slots))
                lines.append(f"  limit {pool.limit!r}, slots for GPUs: {slots}")
            _make_automation(client, _crash_the_dead(pool.name))
            _deploy_step(pool.name)
            lines.append(f"  deployment {steps.step.name}/{pool.name}, and an automation for runs that die")
    return lines


def template(pool: Pool) -> dict[str, Any]:
    """Return the base job template of a pool.

    Args:
        pool: The pool.

    Returns:
        The template; it declares the variables that `Resources.job_variables` may set.
    """
    text = files(__name__).joinpath(f"{pool.type}.json").read_text()
    made: dict[str, Any] = json.loads(text)
    declared = made["variables"]["properties"]
    if pool.gpus is not None:
        declared["env"]["default"]["VLLM_TASKS_GPU_SLOTS"] = pool.limit
        # Kubernetes hands out devices itself, to other flows on the pool as well.
        if pool.type != "kubernetes":
            declared["env"]["default"]["VLLM_TASKS_GPUS"] = "1"
    if pool.image:
        declared["image"]["default"] = pool.image
    return made


def _made(make: Callable[[], T]) -> T:
    """What `make` returns. It is called again if the object appeared meanwhile: somebody else has made it, or
    this process, whose client repeats a request when the server's answer takes too long."""
    try:
        return make()
    except ObjectAlreadyExists:
        return make()


def _make_pool(client: SyncPrefectClient, pool: Pool) -> None:
    wanted = template(pool)
    try:
        there = client.read_work_pool(pool.name)
    except ObjectNotFound:
        made = WorkPoolCreate(name=pool.name, type=pool.type, base_job_template=wanted)
        client.create_work_pool(made)
        return
    if there.type != pool.type:
        raise InvalidCall(
            f"the work pool {pool.name!r} exists with type {there.type!r}, not {pool.type!r}, and a pool "
            "keeps its type: give another name, or delete it first (prefect work-pool delete)"
        )
    _keep_defaults(wanted, there.base_job_template, pool)
    if wanted != there.base_job_template:
        client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=wanted))


def _keep_defaults(wanted: dict[str, Any], there: dict[str, Any], pool: Pool) -> None:
    """Copy the defaults of the existing pool into the template that it is to have."""
    old = there.get("variables", {}).get("properties", {})
    for name, variable in wanted["variables"]["properties"].items():
        default = old.get(name, {}).get("default")
        if name == "env":
            variable["default"] |= default or {}
        elif default is not None and not (name == "image" and pool.image):
            variable["default"] = default


def _make_limit(client: SyncPrefectClient, name: str, slots: int, change: bool) -> int:
    """Make the limit or change it, and return the number of slots that it has now."""
    try:
        there = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        return slots
    if change and there.limit != slots:
        client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=slots))
        return slots
    return there.limit


def _crash_the_dead(pool: str) -> AutomationCore:
    """The automation against zombie runs from Prefect's documentation, for the runs of one pool.

    It covers no other runs, because these may send heartbeats less often.
    """
    return AutomationCore(
        name=f"{pool}: runs whose process died are Crashed",
        description="A run of this work pool that sends no more heartbeats does not stay Running.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "work-pool", "prefect.resource.name": pool}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=DEAD_AFTER,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"no heartbeat for {DEAD_AFTER.seconds} s: its process counts as dead",
                force=False,
            )
        ],
    )


def _make_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    there = client.read_automations_by_name(wanted.name)
    if not there:
        client.create_automation(wanted)
    elif AutomationCore(**there[0].model_dump(include=set(AutomationCore.model_fields))) != wanted:
        client.update_automation(there[0].id, wanted)


def _deploy_step(pool: str) -> None:
    """Deploy the step by its module in the installed package, so that workers need no files of it."""
    deployment = RunnerDeployment.from_flow(
        steps.step, pool, work_pool_name=pool, entrypoint_type=EntrypointType.MODULE_PATH, tags=[TAG]
    )
    deployment.apply()
