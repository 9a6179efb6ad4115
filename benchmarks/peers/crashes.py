"""Crash of a client: it is killed when half of its rows are completed, and the same command runs again.

Each client uses a scripted server that takes a second for a request and counts the requests of each prompt.
The client and all its descendants get SIGKILL, so nothing can clean up; then it starts again with the same
folder. Each client is given the folders and options that it needs to resume.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks import results
from benchmarks.children import Child, ChildFailed
from benchmarks.peers import clients, foreign, own_engine, rays
from benchmarks.peers.field import say
from benchmarks.peers.plan import CRASH, Plan
from benchmarks.peers.plan import CRASH_ROWS as ROWS
from benchmarks.peers.side import Outcome, reason
from benchmarks.peers.usage import tree
from benchmarks.workload import Row
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer, refused, usual

SECOND = 1.0
TIME_LIMIT = 120.0

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Crash:
    """The result of a crash: `repeated` requests were for a row sent before; `seconds` is until the end."""

    name: str
    in_flight: int
    repeated: int
    outcome: Outcome
    seconds: float

    def cells(self) -> tuple[str, ...]:
        found = self.outcome
        twice = max(0, found.stored - found.completed)
        return (
            self.name,
            str(self.repeated),
            str(self.in_flight),
            str(ROWS - found.completed),
            str(twice),
            f"{self.seconds:.0f}",
            results.one_line(found.died),
        )


class SlowServer:
    """A scripted server that completes requests after `SECOND` and counts the requests of each prompt."""

    def __init__(self) -> None:
        self.server = ScriptedServer(self.answer)
        self.completed = 0
        self.prompts: Counter[str] = Counter()

    async def answer(self, asked: Asked) -> Reply:
        if asked.body is None:
            return as_json(usual(asked))
        if asked.body.get("messages") == []:  # a client's request for rate limits
            return refused(400, "no messages")
        self.prompts[asked.prompt] += 1
        await asyncio.sleep(SECOND)
        self.completed += 1
        return as_json(usual(asked))


def as_json(reply: Reply) -> Reply:
    """The reply with the fields that some clients need and the scripted server leaves out."""
    if "usage" in reply.body:
        usage = reply.body["usage"]
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return dataclasses.replace(reply, headers={"Content-Type": "application/json"})


def jobs(flight: int) -> dict[str, Callable[[str, str], tuple[Any, Arguments]]]:
    """The work and arguments of each client, given the server's URL and a folder that both processes
    share."""

    def of_foreign(name: str) -> Callable[[str, str], tuple[Any, Arguments]]:
        return lambda url, folder: (foreign.serve, (name, url, MODEL, flight, folder))

    return {
        own_engine.TABLE: lambda url, folder: (clients.serve_table, (url, flight, folder)),
        clients.SMALL: lambda url, folder: (clients.serve_table, (url, flight, folder)),
        rays.HTTP: lambda url, folder: (rays.serve_http, (url, MODEL, flight, folder)),
        foreign.NAMES["datatrove"]: of_foreign("datatrove"),
        foreign.NAMES["curator"]: of_foreign("curator"),
    }


def observe(plan: Plan) -> list[Crash]:
    """One crash of each client."""
    if not plan.has_workload(CRASH):
        return []
    rows = plan.rows(CRASH, 0)
    found = []
    for name, job in jobs(plan.options.concurrency).items():
        if plan.has_side(name) and not (plan.short and name != clients.SMALL):
            crash = crashed(name, job, rows)
            say(f"crash: {crash}")
            found.append(crash)
    return found


def crashed(name: str, job: Callable[[str, str], tuple[Any, Arguments]], rows: Sequence[Row]) -> Crash:
    slow = SlowServer()
    with slow.server as server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work, arguments = job(server.url, folder)
        started = time.perf_counter()
        in_flight = 0
        try:
            in_flight = killed_at_half(slow, name, Child(work, *arguments), rows)
            with Child(work, *arguments) as again:
                again.send((name, list(rows)))
                outcome: Outcome = again.receive(TIME_LIMIT)
                seconds = time.perf_counter() - started
        except (ChildFailed, TimeoutError) as error:
            outcome, seconds = Outcome(0.0, 0, 0, died=reason(error)), time.perf_counter() - started
    requests = {row.prompt: slow.prompts[row.prompt] for row in rows}
    return Crash(name, in_flight, sum(requests.values()) - len(rows), outcome, seconds)


def killed_at_half(slow: SlowServer, name: str, child: Child, rows: Sequence[Row]) -> int:
    """Kill a client at half of its rows; returns the requests in flight then. Raises TimeoutError before
    half."""
    with child:
        child.send((name, list(rows)))
        deadline = time.monotonic() + TIME_LIMIT
        while slow.completed < len(rows) // 2:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{slow.completed} of {len(rows)} rows after {TIME_LIMIT:g} s")
            time.sleep(0.02)
        in_flight = slow.server.open
        # SIGKILL to every process of the tree: none can save anything, or go on sending requests.
        for pid in tree(child.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return in_flight


def table(crashes: Sequence[Crash]) -> str:
    if not crashes:
        return ""
    head = (
        "side",
        "rows sent again",
        "of them in flight",
        "rows lost",
        "rows twice in the output",
        "seconds",
        "",
    )
    title = f"### A crash at half (`crash`): SIGKILL after {ROWS // 2} of {ROWS} rows, then the same command"
    return f"{title}\n\n{results.table(head, [crash.cells() for crash in crashes])}"
