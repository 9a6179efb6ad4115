"""What all sides have in common: a process that answers rows with an `Outcome`, measured from outside."""

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
    """What a run came to, as the side saw it.

    `work` is seconds from the order (or from its first request, where each run starts an engine: then
    `startup` is the seconds before) until all answers were where the side puts them. `tokens` came out;
    `answered` rows have an output, `errors` an error of their own. `died` says why a run ended as a whole.
    """

    work: float
    tokens: int
    answered: int
    errors: int = 0
    startup: float = 0.0
    died: str = ""
    stored: int = 0
    """Rows in the output of a run that was begun before: more than `answered` where some are there twice."""


@dataclass(frozen=True)
class Measured:
    """An outcome, and the CPU seconds that it cost."""

    outcome: Outcome
    usage: Usage
    rows: list[Row]


@dataclass
class Side:
    """A way to do rows, and the process that does them; `startup` is seconds until that took rows.

    `share` is the part of the rows that it gets, where it is too slow for all.
    """

    name: str
    child: Child
    startup: float
    share: float = 1.0

    def run(self, rows: Sequence[Row], timeout: float | None = None) -> Measured:
        """Do the rows, after a rest; raises TimeoutError, after which the side is of no use any more."""
        time.sleep(SETTLE)
        with Meter(self.child.pid) as meter:
            self.child.send((self.name, list(rows)))
            outcome: Outcome = self.child.receive(timeout)
        return Measured(outcome, meter.usage(), list(rows))


def start(stack: ExitStack, names: Sequence[str], work: Any, *args: Any) -> list[Side]:
    """Start a process that does rows in so many ways; the stack ends it."""
    started = time.perf_counter()
    child = stack.enter_context(Child(work, *args))
    startup = time.perf_counter() - started
    return [Side(name, child, startup) for name in names]


def answer_all(pipe: Connection, ways: Mapping[str, Answer]) -> None:
    """The process's side: say that it is ready, then do rows in the way asked for until the pipe ends."""
    pipe.send("ready")
    while True:
        way, rows = pipe.recv()
        pipe.send(ways[way](rows))


def dead(started: float, error: BaseException) -> Outcome:
    """The outcome of a run that ended with an error as a whole."""
    return Outcome(time.perf_counter() - started, 0, 0, died=reason(error))


def reason(error: BaseException) -> str:
    """The kind of an error and the end of the last traceback in it, else its last line."""
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    named = [line for line in lines if NAMED.match(line)]
    return f"{type(error).__name__}: {(named or lines or [''])[-1]}"
