"""A Prefect site as in the README: server with UI, work pools, deployments, a worker.

Tests call it by HTTP and from other processes: the threads of Prefect's client in this process would keep
calling a server that has ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.eventually import LONG_ENOUGH
from tests.servers.ports import free_port
from tests.servers.postgres import binaries, running

REPOSITORY = Path(__file__).parent.parent


@contextmanager
def database() -> Iterator[dict[str, str]]:
    """PostgreSQL for Prefect, as in production: under worker, automations and browser its SQLite stalls."""
    if binaries() is None:
        yield {}
        return
    with running() as server:
        url = server.new_database().replace("postgresql:", "postgresql+asyncpg:")
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


@contextmanager
def prefect_with_ui() -> Iterator[str]:
    """The URL of a Prefect server; that of `prefect_test_harness` has no UI and starts nothing."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    folder = tempfile.TemporaryDirectory(prefix="vllm-tasks-ui-", ignore_cleanup_errors=True)
    with database() as database_settings, folder as home:
        settings = {
            **database_settings,
            "PREFECT_HOME": home,
            "PREFECT_UI_API_URL": f"{url}/api",
            "PREFECT_UI_STATIC_DIRECTORY": f"{home}/ui",  # else it is written beside the package
            "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
            "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "true",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
        log = Path(home, "log")
        with log.open("w") as out, ended(command, os.environ | settings, out) as process:
            _wait_until_healthy(url, process, log)
            yield url


@contextmanager
def spoken_to(url: str) -> Iterator[None]:
    """The server of flows and tasks in this process. Prefect's threads for logs and events keep the server
    they first spoke to, so they begin and end with the block."""
    _say_the_rest()
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}):
        yield
        _say_the_rest()


def _say_the_rest() -> None:
    APILogWorker.drain_all()
    EventsWorker.drain_all()


@contextmanager
def ended(command: list[str], env: dict[str, str], out: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is terminated after the block."""
    process = subprocess.Popen(
        command, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True
    )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):  # none of its children is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + LONG_ENOUGH
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/api/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"no Prefect server at {url}: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Site:
    """A server, its folder for tables (a lake), the environment of a worker, and what the worker says."""

    url: str
    lake: Path
    env: dict[str, str]
    worker_log: Path

    def command(self, *words: str, cwd: Path = REPOSITORY) -> str:
        """The output of a Python command, such as `-m prefect deploy --all`."""
        done = subprocess.run(
            [sys.executable, *words],
            env=self.env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=LONG_ENOUGH,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The server's response; a request that meets a locked SQLite is repeated."""
        until = time.monotonic() + LONG_ENOUGH
        while True:
            response = httpx.request(method, f"{self.url}/api{path}", json=body, timeout=LONG_ENOUGH)
            if response.status_code != 503 or time.monotonic() > until:
                assert response.is_success, response.text
                return response.json() if response.content else None
            time.sleep(0.2)

    def put(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Make a table of the lake."""
        (self.lake / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def save(self, kind: str, name: str, **fields: Any) -> str:
        """Save a block; its id."""
        of = self.get(f"/block_types/slug/{kind}")["id"]
        schemas = self.post("/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [of]}}})
        block = {"name": name, "data": fields, "block_type_id": of, "block_schema_id": schemas[0]["id"]}
        made: str = self.post("/block_documents/", block)["id"]
        return made

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/deployments/name/{name}")
        return found

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The runs of a deployment that are not for later, oldest first."""
        wanted = {"id": {"any_": [self.deployment(deployment)["id"]]}}
        found = self.post("/flow_runs/filter", {"deployments": wanted, "sort": "START_TIME_ASC"})
        return [run for run in found if run["state_name"] != "Scheduled" or not run["auto_scheduled"]]

    def start(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        """A run of a deployment, once it has ended."""
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return self.ended(self.post(path, {"parameters": parameters})["id"])

    def ended(self, run: str) -> dict[str, Any]:
        """A run, once it has ended."""
        try:
            self.wait_until(lambda: self.get(f"/flow_runs/{run}")["end_time"])
        except AssertionError as error:
            error.add_note(f"{self.get(f'/flow_runs/{run}')}\nworker: {self.worker_log.read_text()[-4000:]}")
            raise
        found: dict[str, Any] = self.get(f"/flow_runs/{run}")
        return found

    def wait_until(self, condition: Callable[[], object], seconds: float = LONG_ENOUGH) -> None:
        """Fails the test when `condition` does not come true."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds} s"
            time.sleep(0.2)


@contextmanager
def made(url: str, folder: Path) -> Iterator[Site]:
    """The README's commands against a server: work pools, deployments, a worker of the pool `vllm`."""
    lake = folder / "lake"
    lake.mkdir()
    env = {
        **os.environ,
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    site = Site(url, lake, env, folder / "worker.log")
    site.command("-m", "vllm_tasks.pools")
    site.command("-m", "prefect", "--no-prompt", "deploy", "--all")
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "vllm"]
    with site.worker_log.open("w") as log, ended(worker, env, log):
        yield site
