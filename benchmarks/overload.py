"""OVERLOAD: our client sends more than a server can take; goal: it uses >= 95 % of the capacity.

A scripted server of known capacity refuses further requests, or queues them, or is out for ten seconds in the
middle. The measures are: requests for each completed row (1 is best), rows that end as errors (none, as the
server recovers), the fraction of the capacity used between the first and the last tenth of the completions,
and the seconds from the end of an outage until 95 % of the capacity are used, over one second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from benchmarks import limited, results
from benchmarks.children import Child
from benchmarks.limited import Limits, Seen
from benchmarks.options import Options
from benchmarks.workload import questions

GOAL = 0.95
LATE = 2.0
"""Seconds by which the second client begins after the first."""


@dataclass(frozen=True)
class Case:
    """A server and its clients: the rows of each client, their window, and their timeout in seconds."""

    name: str
    limits: Limits
    rows: int = 1500
    window: int = 256
    timeout: float = 600.0
    clients: int = 1
    beside: tuple[Limits, ...] = ()
    """Further servers of the same clients."""

    @property
    def servers(self) -> tuple[Limits, ...]:
        return (self.limits, *self.beside)

    @property
    def capacity(self) -> float:
        """Completions a second of all servers, at most."""
        return sum(limits.capacity for limits in self.servers)


@dataclass(frozen=True)
class ClientRun:
    """A client's counts of completed and failed rows, and its times of begin and end (seconds, any
    origin)."""

    completed: int
    errors: int
    began: float
    ended: float


QUICK, SLOW = Limits(32, 0.25), Limits(16, 1.0)
OUT = replace(QUICK, outage=10.0, outage_after=500)
ROOMY = Limits(64, 0.25, beyond=0)
DEAF = replace(ROOMY, deaf=0.8, outage=1.5, outage_status=429, outage_after=500)
AWAY = replace(ROOMY, outage=1.0, outage_after=500, outage_status=0)
CASES = (
    Case("429", QUICK),
    Case("503", replace(QUICK, beyond=503)),
    Case("429, Retry-After: 1", replace(QUICK, retry_after="1")),
    Case("429, Retry-After: a date", replace(QUICK, retry_after="date")),
    Case("429, 16 rows/s", SLOW, rows=640),
    Case("429, a window of 48", QUICK, window=48),
    Case("429, a window of 2,048", QUICK, window=2048, rows=4000),
    Case("waits", replace(QUICK, beyond=0)),
    Case("waits, longer than the timeout", replace(QUICK, beyond=0), timeout=1.2),
    Case("out: 503", OUT),
    Case("out: 429, Retry-After: 1", replace(OUT, retry_after="1", outage_status=429)),
    Case("out: no connections", replace(OUT, outage_status=0)),
    Case("429, two clients", QUICK, clients=2),
    Case("429, Retry-After: 1, two clients", replace(QUICK, retry_after="1"), clients=2),
    Case("takes all; a row never ends", replace(ROOMY, hangs=300), window=64, timeout=3.0, rows=3000),
    Case("deaf for 0.8 s, then 429 for 1.5 s", DEAF, window=64, timeout=1.0, rows=3000),
    Case("429, one of two servers", Limits(2, 1.0), window=64, rows=2000, beside=(ROOMY,)),
    Case("three of four away for 1 s", ROOMY, window=64, rows=8000, beside=(AWAY,) * 3),
)
HOW = f"""\
One client process (`VllmAPI` with default settings except for the window) sends requests to one server
process. The server completes 32 requests at once in 0.25 s, or 16 in 1 s (16 rows/s); the first column
says what it does with requests beyond that. The last four cases have servers of 64 requests in 0.25 s, and
the throttled one takes 2 in 1 s. *Requests*: requests for each completed row. *Capacity*: the fraction
used, without the first and the last tenth of the completions; if the server is out for {OUT.outage:g} s in
the middle, the fraction used after recovery. *Recovered*: seconds from the end of the outage until
{GOAL:.0%} of the capacity are used, over one second. *Ended*: seconds that each of two clients with as
many rows took; the second begins {LATE:g} s later. Goals: {GOAL:.0%} of the capacity, no error; a figure
that misses its goal is in **bold**."""


def measure(options: Options) -> Iterator[str]:
    """A line for each case; writes the part `Overload` of the results."""
    lines = []
    for case in CASES:
        seen, runs = run(case)
        cells = figures(case, seen, runs)
        lines.append([case.name, f"{case.window:,}", *cells])
        words = ("requests a row", "errors", "of capacity", "s to recover", "s of each")
        found = [f"{cell} {word}" for cell, word in zip(cells, words, strict=True) if cell]
        yield f"OVERLOAD {case.name}: {', '.join(found)}; goal >= {GOAL:.0%}, 0 errors"
    head = ["beyond its capacity", "window", "requests", "errors", "capacity", "recovered, s", "ended"]
    body = f"{HOW}\n\n{results.table(head, lines)}"
    results.record("Overload", "make bench-OVERLOAD", body, ("vllm_tasks", "aiohttp"))


def run(case: Case) -> tuple[Seen, list[ClientRun]]:
    """The counts of the servers together, and the run of each client."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Child(limited.serve, limits)) for limits in case.servers]
        urls = ",".join(f"{server.ready}/v1/completions" for server in servers)
        clients = [stack.enter_context(Child(client, urls, case, late)) for late in range(case.clients)]
        for child in clients:
            child.send("go")
        runs = [child.receive() for child in clients]
        return together([server.request("seen") for server in servers]), runs


def together(seen: list[Seen]) -> Seen:
    """The sums over all servers; the outage ends when the last server is back."""
    return Seen(
        sum(each.requests for each in seen),
        sum(each.refused for each in seen),
        sorted(at for each in seen for at in each.completed),
        max(each.back for each in seen),
    )


def client(pipe: Connection, urls: str, case: Case, late: int) -> None:
    """Process the rows of the case, `late * LATE` seconds after the message; send a `ClientRun`."""
    from vllm_tasks import RowError, VllmAPI

    model = VllmAPI(
        identifier="bench",
        api_url=urls,
        model="m",
        max_in_flight=case.window,
        timeout=case.timeout,
        predict_kwargs={"temperature": 0},
    )
    prompts = questions(None, case.rows, seed=late)
    pipe.send("ready")
    pipe.recv()
    time.sleep(late * LATE)
    began = time.monotonic()
    answers = model.predict_batches(prompts, on_error="return")
    errors = sum(isinstance(answer, RowError) for answer in answers)
    pipe.send(ClientRun(len(answers) - errors, errors, began, time.monotonic()))


def figures(case: Case, seen: Seen, runs: list[ClientRun]) -> list[str]:
    """Requests a row, errors, fraction of the capacity, seconds to recover, seconds of two clients."""
    times = seen.completed
    completed = sum(run.completed for run in runs)
    first, last = times[len(times) // 10], times[len(times) * 9 // 10]
    recovered = ""
    if seen.back:
        back = back_at(times, seen.back, case.capacity)
        recovered = "**never**" if back is None else f"{back - seen.back:.1f}"
        first = times[-1] if back is None else back
    used = sum(first < at <= last for at in times) / (last - first) / case.capacity if last > first else 0
    ended = ""
    if len(runs) > 1:
        ended = ", ".join(f"{run.ended - run.began:.1f} s" for run in runs)
    errors = sum(run.errors for run in runs)
    return [
        f"{seen.requests / max(completed, 1):.2f}",
        f"**{errors:,}**" if errors else "0",
        f"{used:.1%}" if used >= GOAL else f"**{used:.1%}**",
        recovered,
        ended,
    ]


def back_at(times: list[float], back: float, capacity: float) -> float | None:
    """The time after `back` at which the first second with `GOAL` of the capacity begins."""
    for i, at in enumerate(times):
        if at >= back and sum(at <= other < at + 1 for other in times[i:]) >= GOAL * capacity:
            return at
    return None
