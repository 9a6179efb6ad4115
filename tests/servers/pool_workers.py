"""A work pool as `make pools` makes it, with process workers that a test may kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from vllm_tasks.pools import Pool, make

END = 20.0
"""Seconds for a worker to end in order."""


class Workers:
    """Workers of the pool `name`; their output and that of their flow runs goes to `log`."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._running: list[subprocess.Popen[bytes]] = []
        self._url = PREFECT_API_URL.value()  # now: other threads have other settings

    def start(self) -> psutil.Process:
        """One more worker, which looks for runs twice a second."""
        assert self._url
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.name],
                env={**os.environ, "PREFECT_API_URL": self._url, "PREFECT_WORKER_QUERY_SECONDS": "0.5"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append(process)
        return psutil.Process(process.pid)

    def runs(self) -> list[psutil.Process]:
        """The processes of the flow runs that work now."""
        found = []
        for worker in self._running:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(worker.pid).children()
        return [p for p in found if p.is_running() and "prefect.engine" in p.cmdline()]

    def kill(self) -> None:
        """SIGKILL for all workers and their flow runs, as if their machine went down."""
        runs = self.runs()
        for worker in self._running:
            worker.kill()
            worker.wait()
        self._running.clear()
        for run in runs:
            run.kill()

    def end(self) -> None:
        for worker in self._running:
            worker.send_signal(signal.SIGINT)
        for worker in self._running:
            try:
                worker.wait(END)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        self._running.clear()


@contextmanager
def pool(name: str, log: Path, gpus: int | None = None) -> Iterator[Workers]:
    """A process pool, and all that belongs to it, for as long as the block."""
    made = Pool(name, "process", gpus)
    list(make(made))
    workers = Workers(name, log)
    try:
        yield workers
    finally:
        workers.end()
        remove(made)


def remove(made: Pool) -> None:
    """Remove a pool and everything that belongs to it from the server."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"vllm-step/{made.name}")
        client.delete_deployment(deployment.id)
        for automation in client.read_automations_by_name(
            f"{made.name}: runs whose process died are Crashed"
        ):
            client.delete_automation(automation.id)
        client.delete_work_pool(made.name)
        with suppress(ObjectNotFound):
            client.delete_global_concurrency_limit_by_name(made.limit)


def runs_of(name: str) -> list[FlowRun]:
    """The flow runs of a name, oldest first."""
    wanted = FlowRunFilter.model_validate({"name": {"any_": [name]}})
    with get_client(sync_client=True) as client:
        return sorted(client.read_flow_runs(flow_run_filter=wanted), key=lambda run: run.created or run.id)


def state_of(run: UUID) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
    assert state is not None
    return state.name
