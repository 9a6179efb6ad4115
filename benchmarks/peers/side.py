"""The common part of all sides: a process that returns an `Outcome` for rows and is measured from outside."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.children import Child
from benchmarks.pairs import SETTLE
from benchmarks.peers.usage import Meter, Usage
from benchmarks.workload import Row

NAMED = re.compile(r"[A-Za-z_.]+(Error|Exception|Failed)\b")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

Answer = Callable[[Sequence[Row]], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, as the side reports it.

    `work` is the seconds from the order until all answers are where the side puts them. If each run starts an
    engine, `work` begins with the first request, and `startup` is the seconds before. `tokens` is the number
    of output tokens; `completed` rows have an output, and `errors` rows an error of their own. `died` is the
    error of a run that failed completely.
    """

    work: float
    tokens: int
    completed: int
    errors: int = 0
    startup: float = 0.0
    died: str = ""
    stored: int = 0
    """Rows in the output of a resumed run; more than `completed` if some are there twice."""


@dataclass(frozen=True)
class Measured:
    """An outcome, the CPU seconds that it took, and its rows."""

    outcome: Outcome
    usage: Usage
    rows: list[Row]


@dataclass
class Side:
    """A way to process rows, and the process that does so; `startup` is the seconds until it accepted rows.

    `fraction` is below 1 for a side that is too slow for all rows.
    """

    name: str
    child: Child
    startup: float
    fraction: float = 1.0

    def run(self, rows: Sequence[Row], timeout: float | None = None) -> Measured:
        """Process the rows after a rest. After a TimeoutError the side cannot be used any more."""
        time.sleep(SETTLE)
        with Meter(self.child.pid) as meter:
            self.child.send((self.name, list(rows)))
            outcome: Outcome = self.child.receive(timeout)
        return Measured(outcome, meter.usage(), list(rows))


def start(stack: ExitStack, names: Sequence[str], work: Any, *args: Any) -> list[Side]:
    """Start a process that processes rows in one or more ways; the stack ends it."""
    started = time.perf_counter()
    child = stack.enter_context(Child(work, *args))
    startup = time.perf_counter() - started
    return [Side(name, child, startup) for name in names]


def answer_all(pipe: Connection, ways: Mapping[str, Answer]) -> None:
    """The side's process: send `ready`, then process rows in the requested way until the pipe ends."""
    pipe.send("ready")
    while True:
        way, rows = pipe.recv()
        pipe.send(ways[way](rows))


def dead(started: float, error: BaseException) -> Outcome:
    """The outcome of a run that failed completely."""
    return Outcome(time.perf_counter() - started, 0, 0, died=reason(error))


def reason(error: BaseException) -> str:
    """The type of an error, and the last line of the last traceback in its text, or else its last line."""
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    named = [line for line in lines if NAMED.match(line)]
    return f"{type(error).__name__}: {(named or lines or [''])[-1]}"
