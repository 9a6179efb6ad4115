"""Runs `predict_in_db`, alone or in a flow, or `validate` in processes that a test may kill at any moment.

A *mother* process imports everything once; each job is a fork of it, which starts in milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self


class Jobs:
    """Jobs as forks of one process, which has `env` in addition; their logs go to `log`."""

    def __init__(self, log: Path, env: Mapping[str, str] = MappingProxyType({})) -> None:
        self.log = log
        self._env = {**os.environ, **env}
        self._mother: subprocess.Popen[str] | None = None
        self._running: set[int] = set()

    def __enter__(self) -> Self:
        self._mother = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs", str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._env,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._mother is not None
        for pid in list(self._running):
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        self._mother.stdin.close()  # type: ignore[union-attr]
        self._mother.wait()
        self._mother.stdout.close()  # type: ignore[union-attr]

    def start(self, model: dict[str, Any], *args: Any, work: str = "predict_in_db", **call: Any) -> int:
        """Begin `work(model, *args, **call)`; returns the process id.

        `model`: the fields of a `VllmAPI`, or of a `VllmModel` when `model_name` is one of them.
        """
        pid = int(self._ask({"work": work, "model": model, "args": args, "call": call}))
        self._running.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit status of a job, negative for a signal, as `subprocess` has it."""
        status = int(self._ask({"wait": pid}))
        self._running.discard(pid)
        return status

    def run(self, model: dict[str, Any], *args: Any, **call: Any) -> None:
        """Run a job to its end; fails the test with its log when it fails."""
        status = self.wait(self.start(model, *args, **call))
        assert status == 0, f"exit status {status}:\n{self.log.read_text()[-5000:]}"

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.wait(pid)

    def _ask(self, question: dict[str, Any]) -> str:
        assert self._mother is not None
        assert self._mother.stdin is not None
        assert self._mother.stdout is not None
        self._mother.stdin.write(json.dumps(question) + "\n")
        self._mother.stdin.flush()
        return self._mother.stdout.readline()


def in_flow(model: Any, *args: Any, **call: Any) -> Any:
    """`predict_in_db` as a task of a flow."""
    from prefect import flow

    from vllm_tasks import predict_in_db

    @flow(name="job")
    def job() -> Any:
        return predict_in_db(model, *args, **call)

    return job()


def in_flow_over_frame(model: Any, columns: Any, path: str, frame: str, **call: Any) -> Any:
    """In a flow, over a table in memory that has the rows of a Parquet file: a frame, or a stream."""
    import polars
    import pyarrow.parquet as pq

    from tests.beside import in_pandas

    table = pq.read_table(path)
    made = {"pandas": in_pandas, "polars": polars.from_arrow, "stream": lambda table: table.to_reader()}
    return in_flow(model, columns, made[frame](table), **call)


def on_scripted_host(model: Any, *args: Any, **call: Any) -> Any:
    """In a flow, with the scripted host as the local engine."""
    from vllm_tasks.engines.local import process

    process.HOST = Path(__file__).with_name("servers") / "scripted_host.py"
    return in_flow(model, *args, **call)


def on_scripted_hosts(model: Any, *args: Any, **call: Any) -> Any:
    """In a flow, on Ray, with scripted hosts as engines."""
    from tests.engines.test_ray import ScriptedActor
    from vllm_tasks.engines.ray import actor

    actor.HostActor = ScriptedActor  # type: ignore[misc]
    return in_flow(model, *args, **call)


def main() -> None:
    import deltalake  # noqa: F401 - imported before the forks
    import duckdb  # noqa: F401
    import psycopg  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    import sqlalchemy.dialects.postgresql  # noqa: F401

    from vllm_tasks import VllmAPI, VllmModel
    from vllm_tasks.tables import predict_in_db
    from vllm_tasks.validation.run import validate

    works = {
        "predict_in_db": predict_in_db,
        "in_flow": in_flow,
        "in_flow_over_frame": in_flow_over_frame,
        "on_scripted_host": on_scripted_host,
        "on_scripted_hosts": on_scripted_hosts,
        "validate": validate,
    }
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the test's
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(log, 1)
            os.dup2(log, 2)
            logging.basicConfig(level=logging.INFO, force=True)
            logging.getLogger("vllm_tasks.vllm").setLevel(logging.DEBUG)  # what an engine prints
            fields = question["model"]
            model = VllmModel(**fields) if "model_name" in fields else VllmAPI(**fields)
            print(works[question["work"]](model, *question["args"], **question["call"]))
            return


if __name__ == "__main__":
    main()
