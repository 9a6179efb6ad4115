"""The check that a relative path is not in code that was pulled for this flow run and is deleted after it."""

from __future__ import annotations

import os
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
"""The only one of Prefect's pull steps that pulls nothing: it changes to a folder that stays."""


def check_stays(db: Datalayer) -> None:
    """Refuse a datalayer in the working directory of a deployment whose code is pulled from a storage.

    That directory is a temporary copy, which is deleted after the flow run with all outputs in it.

    Args:
        db: The datalayer that outputs are written to.

    Raises:
        InvalidCall: Its path is relative, and the deployment's code is pulled.
    """
    _, path = path_of(db.url.get_secret_value().strip())
    if not path or os.path.isabs(path):
        return
    pulled = within_grace_period(_pulled)
    if pulled is not None:
        raise InvalidCall(
            f"db={path!r:.200} is in the code that this deployment pulls ({pulled}), which is deleted with "
            "the flow run, and all outputs with it: give a full path that the worker keeps, or a URL"
        )


def _pulled() -> str | None:
    """The name of the step that pulled the code of the running deployment; None if there is none."""
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
            steps = client.read_deployment(run.deployment_id).pull_steps or ()
        except ObjectNotFound:  # the run or deployment is on another Prefect server, or was deleted
            return None
    names = [name for step in steps for name in step]
    return next((name for name in names if not name.endswith(IN_PLACE)), None)
