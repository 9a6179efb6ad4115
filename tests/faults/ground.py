"""The ground of faults: tables of three kinds, a Prefect server, flows in processes of their own."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.faults.ledger import UNDISTURBED, Ledger
from tests.faults.leftovers import nothing_left
from tests.faults.prefect_server import PrefectServer
from tests.faults.work import GENERATE, Work
from tests.jobs import Jobs
from tests.places import Place
from tests.servers.postgres import Postgres, running
from tests.servers.scripted_server import MODEL, Script, ScriptedServer

GROUP = 20
"""Rows of a commit group."""
IN_FLIGHT = 16
ATTEMPTS = 5
OF_JOBS = {"VLLM_TASKS_GRACE_PERIOD": "600"}
"""A real server takes its time to come back, where others are at work on the machine."""


class Lacking(Exception):
    """The machine lacks what a run needs, such as a compiler, so the run is left out."""


@dataclass
class Ground:
    """The servers, tables and processes of one seed."""

    folder: Path
    seed: int
    postgres: Postgres
    prefect: PrefectServer
    _stack: ExitStack
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def jobs(self) -> Jobs:
        """Processes that may be killed."""
        return self.jobs_in({})

    def jobs_in(self, env: Mapping[str, str]) -> Jobs:
        """Such processes in an environment of their own; they end with the ground."""
        log = self.folder / f"jobs{next(self._numbers)}.log"
        return self._stack.enter_context(Jobs(log, {**OF_JOBS, "PREFECT_API_URL": self.prefect.api, **env}))

    def chance(self, kind: str) -> random.Random:
        """The schedule of one kind of fault; it does not depend on earlier runs."""
        return random.Random(f"{self.seed} {kind}")

    def place(self, kind: str) -> Place:
        """An empty lake, SQLite file or PostgreSQL database."""
        if kind == "postgres":
            return Place(self.postgres.new_database())
        folder = self.folder / f"{next(self._numbers)}"
        folder.mkdir()
        return Place(str(folder / "lake") if kind == "lake" else f"sqlite:///{folder}/tables.db")

    def run_of(
        self,
        kind: str,
        place: Place,
        server: ScriptedServer,
        rows: int = 400,
        work: Work = GENERATE,
        text: Callable[[int], str] = "t{}".format,
    ) -> ScriptedRun:
        ledger = Ledger(kind, place, rows, self.seed, lambda: asked_of(server), needs=work.needs, text=text)
        return ScriptedRun(ledger, server, work)


def asked_of(server: ScriptedServer) -> Counter[int]:
    """The number of requests for each row; those of a gateway, which are for none, do not count."""
    found = (re.match(r"t(\d+)", asked.prompt) for asked in server.posts)
    return Counter(int(match[1]) for match in found if match)


@dataclass
class ScriptedRun:
    """Calls for the rows of a ledger, answered by a scripted server."""

    ledger: Ledger
    server: ScriptedServer
    work: Work = GENERATE
    fields: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=lambda: {"max_chunk_size": GROUP, "max_failed": None})

    @property
    def model(self) -> dict[str, Any]:
        return {
            "identifier": "m",
            "api_url": self.server.url,
            "model": MODEL,
            "db": {"url": self.ledger.place.url},
            "max_in_flight": IN_FLIGHT,
            "chat": False,  # no test request, which would count as a row
            **self.work.fields,
            **self.fields,
        }

    def start(self, jobs: Jobs, **call: Any) -> int:
        """Begin the call in a flow; returns the process id."""
        return jobs.start(self.model, *self.work.table, **{**self.work.call, **self.call, **call})

    def finish(self, jobs: Jobs, **call: Any) -> None:
        """Run the same call to its end."""
        jobs.run(self.model, *self.work.table, **{**self.work.call, **self.call, **call})

    def go_on(self, jobs: Jobs, job: int, moment: str) -> None:
        """Wait for the end of a job that meets faults, and repeat the call as often as it stops."""
        for _ in range(ATTEMPTS):
            if jobs.wait(job) == 0:
                return self.ledger.fault(f"{moment}; it went on")
            self.ledger.death(f"{moment}; it stopped")
            job = self.start(jobs)
        return self.finish(jobs)

    def undisturbed(self, jobs: Jobs, script: Script = lambda _: None) -> None:
        """Process the same rows under another name, without faults and without counting."""
        counted = len(self.server.requests)
        self.server.script = script
        model = {**self.model, "api_url": self.server.url}
        jobs.run(model, *self.work.table, **self.work.call, predict_id=UNDISTURBED)
        del self.server.requests[counted:]


@contextmanager
def made(folder: Path, seed: int) -> Iterator[Ground]:
    """The ground of a seed, which is removed afterwards."""
    with nothing_left(folder), running() as postgres, PrefectServer(folder / "prefect") as prefect:
        here = {PREFECT_API_URL: prefect.api}
        with temporary_settings(here), ExitStack() as stack:
            yield Ground(folder, seed, postgres, prefect, stack)
