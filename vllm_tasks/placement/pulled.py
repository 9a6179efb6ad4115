"""The check that a relative path is not in a working directory that is deleted after the flow run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import InvalidCall
from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.placement.payload import path_of
from vllm_tasks.placement.target import MADE_FOR

IN_PLACE = "set_working_directory"
"""The one pull step of Prefect that pulls nothing: with a full path, it changes to a folder that stays."""


def check_stays(db: Datalayer) -> None:
    """Refuse a datalayer in the working directory of a deployment where a worker made it for the run.

    That directory is temporary, with or without code that was pulled into it: it is deleted after the flow
    run with all outputs in it.

    Args:
        db: The datalayer that outputs are written to.

    Raises:
        InvalidCall: Its path is relative, and so is what the deployment's pull steps change to.
    """
    _, path = path_of(db.url.get_secret_value().strip())
    if not path or os.path.isabs(path):
        return
    temporary = within_grace_period(_temporary)
    if temporary is not None:
        raise InvalidCall(
            f"db={path!r:.200} is in the working directory of this flow run ({temporary}), which is deleted "
            "with the flow run, and all outputs with it: give a full path that the worker keeps, or a URL"
        )


def _temporary() -> str | None:
    """Why the running deployment works in a temporary folder; None if it does not."""
    context, made_for = FlowRunContext.get(), os.environ.get(MADE_FOR)
    run = context.flow_run if context else None
    if not made_for and (run is None or run.deployment_id is None):
        return None
    with get_client(sync_client=True) as client:
        try:
            if made_for:  # the current flow run may be a subflow, which has no deployment
                run = client.read_flow_run(UUID(made_for))
            if run is None or run.deployment_id is None:
                return None
            deployment = client.read_deployment(run.deployment_id)
        except ObjectNotFound:  # the run or deployment is on another Prefect server, or was deleted
            return None
    steps = [each for step in deployment.pull_steps or () for each in step.items()]
    if any(_stays(name, inputs) for name, inputs in steps):
        return None
    if steps:
        return ", ".join(name for name, _ in steps)
    # A deployment without a pool is served: it runs where that process was started.
    return "the deployment has no pull step" if deployment.work_pool_name else None


def _stays(name: str, inputs: Mapping[str, Any] | None) -> bool:
    return name.endswith(IN_PLACE) and os.path.isabs((inputs or {}).get("directory", ""))
