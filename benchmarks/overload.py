"""OVERLOAD: our client and a server that can do less than it is asked for: goal >= 95 % of its capacity.

A scripted server of known capacity refuses what is beyond it, or lets it wait, or is out for ten seconds in
the middle. What counts: requests for each row answered (1 is best), rows that end as errors (none, as the
server goes on), the share of the capacity that is used, between the first and the last tenth of the answers,
and the seconds from the end of an outage until 95 % of the capacity are reached, over one second.
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
"""Seconds after the first client that the second one begins."""


@dataclass(frozen=True)
class Case:
    """A server, and how it is asked: rows of each client, their window and timeout (s)."""

    name: str
    limits: Limits
    rows: int = 1500
    window: int = 256
    timeout: float = 600.0
    clients: int = 1
    beside: tuple[Limits, ...] = ()
    """Further servers."""

    @property
    def servers(self) -> tuple[Limits, ...]:
        return (self.limits, *self.beside)

    @property
    def capacity(self) -> float:
        """Answers a second of all servers, at most."""
        return sum(limits.capacity for limits in self.servers)


@dataclass(frozen=True)
class Asking:
    """What a client has: rows answered and failed, and when it began and ended (seconds, any origin)."""

    answered: int
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
One client process (`VllmAPI`, defaults but for the window) and one server process, which answers 32 requests
at once in 0.25 s, or 16 in 1 s (16 rows/s), and has this for those beyond them; the last four have servers of
64 in 0.25 s, the throttled one of 2 in 1 s. *Requests*: for each row
answered. *Capacity*: the share that was used, without the first and the last tenth of the answers; where
the server is out for {OUT.outage:g} s in the middle, once it has recovered. *Recovered*:
seconds after the outage until {GOAL:.0%} of the capacity are reached, over one second. *Ended*: seconds that
each of two clients with as many rows took, the second of which begins {LATE:g} s later. Goals: {GOAL:.0%} of
the capacity, no error; what misses one is in **bold**."""


def measure(options: Options) -> Iterator[str]:
    """A line for each case; writes the part `Overload` of the results."""
    lines = []
    for case in CASES:
        seen, askings = run(case)
        cells = figures(case, seen, askings)
        lines.append([case.name, f"{case.window:,}", *cells])
        words = ("requests a row", "errors", "of capacity", "s to recover", "s of each")
        told = [f"{cell} {word}" for cell, word in zip(cells, words, strict=True) if cell]
        yield f"OVERLOAD {case.name}: {', '.join(told)}; goal >= {GOAL:.0%}, 0 errors"
    head = ["beyond its capacity", "window", "requests", "errors", "capacity", "recovered, s", "ended"]
    body = f"{HOW}\n\n{results.table(head, lines)}"
    results.record("Overload", "make bench-OVERLOAD", body, ("vllm_tasks", "aiohttp"))


def run(case: Case) -> tuple[Seen, list[Asking]]:
    """What server and clients saw."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Child(limited.serve, limits)) for limits in case.servers]
        urls = ",".join(f"{server.ready}/v1/completions" for server in servers)
        clients = [stack.enter_context(Child(client, urls, case, late)) for late in range(case.clients)]
        for child in clients:
            child.send("go")
        askings = [child.receive() for child in clients]
        return together([server.ask("seen") for server in servers]), askings


def together(seen: list[Seen]) -> Seen:
    """What all servers saw; the outage ends when the last one is back."""
    return Seen(
        sum(each.requests for each in seen),
        sum(each.refused for each in seen),
        sorted(at for each in seen for at in each.answered),
        max(each.back for each in seen),
    )


def client(pipe: Connection, urls: str, case: Case, late: int) -> None:
    """Ask the rows of the case, `late * LATE` seconds after the word; send an `Asking`."""
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
    pipe.send(Asking(len(answers) - errors, errors, began, time.monotonic()))


def figures(case: Case, seen: Seen, askings: list[Asking]) -> list[str]:
    """Requests a row, errors, share of the capacity, seconds to recover, seconds of two clients."""
    times = seen.answered
    answered = sum(asking.answered for asking in askings)
    first, last = times[len(times) // 10], times[len(times) * 9 // 10]
    recovered = ""
    if seen.back:
        back = back_at(times, seen.back, case.capacity)
        recovered = "**never**" if back is None else f"{back - seen.back:.1f}"
        first = times[-1] if back is None else back
    used = sum(first < at <= last for at in times) / (last - first) / case.capacity if last > first else 0
    ended = ""
    if len(askings) > 1:
        ended = ", ".join(f"{asking.ended - asking.began:.1f} s" for asking in askings)
    errors = sum(asking.errors for asking in askings)
    return [
        f"{seen.requests / max(answered, 1):.2f}",
        f"**{errors:,}**" if errors else "0",
        f"{used:.1%}" if used >= GOAL else f"**{used:.1%}**",
        recovered,
        ended,
    ]


def back_at(times: list[float], back: float, capacity: float) -> float | None:
    """When, after `back`, one second with `GOAL` of the capacity begins."""
    for i, at in enumerate(times):
        if at >= back and sum(at <= other < at + 1 for other in times[i:]) >= GOAL * capacity:
            return at
    return None
