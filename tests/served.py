"""A flow of the package, served as documented, and a run of it created as from its form."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from tests.eventually import LONG_ENOUGH, eventually


def run_when_served(flow: str, form: dict[str, Any]) -> FlowRun:
    """The completed run of `vllm_tasks.flows.<flow>` with these parameters, in a process of its own."""
    url = PREFECT_API_URL.value()
    assert url
    serving = subprocess.Popen(
        [sys.executable, "-m", f"vllm_tasks.flows.{flow}", "--name", "tested"],
        env={**os.environ, "PREFECT_API_URL": url},
        start_new_session=True,
    )
    deployment = f"{flow.replace('_', '-')}/tested"
    try:
        assert eventually(lambda: is_deployed(deployment))
        run = run_deployment(deployment, parameters=form, timeout=LONG_ENOUGH, poll_interval=0.5)
    finally:
        serving.send_signal(signal.SIGINT)
        try:
            serving.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait()
    assert isinstance(run, FlowRun)
    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    return run


def is_deployed(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            return False
    return True
