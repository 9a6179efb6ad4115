"""A group of sides: they start together and run in turn, and the output tokens of each run are checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.children import ChildFailed
from benchmarks.pairs import in_turn
from benchmarks.peers.plan import DUPLICATES, SHORT, Plan
from benchmarks.peers.side import Measured, Side, reason, start
from benchmarks.workload import Row, output_tokens

LIMIT = 420.0
"""Seconds that one run may take."""
WARM_UP = 32
"""Rows before the first round, for the resident sides."""

CountTokens = Callable[[], int]
"""Returns the number of output tokens that the server has generated so far."""


@dataclass
class Field:
    """The sides of a group (`sides` are the live ones), their runs by workload and side, and reasons of
    absence.

    `count` reads the server's number of tokens; without it, each side's own number counts.
    """

    title: str
    plan: Plan
    stack: ExitStack
    count: CountTokens | None = None
    sides: dict[str, Side] = field(default_factory=dict)
    sides_ever: dict[str, Side] = field(default_factory=dict)
    runs: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def start(self, names: Sequence[str], work: Any, *args: Any) -> None:
        """Start a process that processes rows in one or more ways; if it fails, record the reason."""
        wanted = [name for name in names if self.plan.has_side(name)]
        if not wanted:
            return
        say(f"starting {', '.join(wanted)}")
        try:
            begun = {side.name: side for side in start(self.stack, wanted, work, *args)}
            self.sides |= begun
            self.sides_ever |= begun
        except (ChildFailed, OSError, subprocess.CalledProcessError) as error:
            self.absent |= dict.fromkeys(wanted, reason(error))

    def warm_up(self, names: Iterable[str], workload: str = SHORT) -> None:
        """Process a few rows that do not count."""
        rows = self.plan.rows(workload, 0)[:WARM_UP]
        for name in self.here(names):
            self.take(workload, name, rows)

    def measure(self, workload: str, names: Sequence[str], once: Sequence[str] = ()) -> None:
        """Run all rounds of a workload; the sides in `once`, which start an engine for each run, run one."""
        if not self.plan.has_workload(workload):
            return
        for round_ in range(1, self.plan.rounds + 1):
            rows = self.plan.rows(workload, round_)
            taking_part = [name for name in self.here(names) if round_ == 1 or name not in once]
            for name in in_turn(taking_part, round_):
                if found := self.take(workload, name, rows):
                    self.runs.setdefault((workload, name), []).append(found)
        self.drop_incomplete(workload, once)

    def of(self, workload: str) -> dict[str, list[Measured]]:
        """The runs of a workload by side."""
        return {name: runs for (measured, name), runs in self.runs.items() if measured == workload}

    def here(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.sides]

    def take(self, workload: str, name: str, rows: Sequence[Row]) -> Measured | None:
        """One run. A side that fails is removed, together with the sides that share its process."""
        side = self.sides.get(name)
        if side is None:
            return None
        before = self.count() if self.count else 0
        try:
            found = side.run(self.own(name, rows[: round(len(rows) * side.fraction)]), LIMIT)
        except (ChildFailed, TimeoutError) as error:
            self.remove(side, reason(error))
            return None
        made = self.count() - before if self.count else found.outcome.tokens
        say(f"{workload}: {name}: {found.outcome} {found.usage} {made} tokens")
        if wrong := difference(workload, found, made):
            self.absent[f"{name} ({workload})"] = wrong
            return None
        return found

    def own(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """The rows with the side's number before each prompt, since some sides share an engine and its
        cache."""
        number = list(self.sides_ever).index(name)
        return [replace(row, prompt=f"{number:02d} {row.prompt}") for row in rows]

    def remove(self, side: Side, why: str) -> None:
        self.absent |= dict.fromkeys(self.forget(side), why)

    def forget(self, side: Side) -> list[str]:
        """Remove a side and those that share its process; returns their names."""
        removed = [name for name, other in self.sides.items() if other.child is side.child]
        for name in removed:
            del self.sides[name]
        return removed

    def drop_incomplete(self, workload: str, once: Sequence[str]) -> None:
        """Drop the runs of a side with fewer runs than rounds: it has no ratio for each round."""
        for key in [key for key in self.runs if key[0] == workload]:
            if len(self.runs[key]) < (1 if key[1] in once else self.plan.rounds):
                del self.runs[key]


def difference(workload: str, found: Measured, made: int) -> str:
    """The difference between a run and its order; empty if there is none."""
    outcome, rows = found.outcome, found.rows
    if outcome.died:
        return outcome.died
    if outcome.completed != len(rows):
        return f"completed {outcome.completed} of {len(rows)} rows"
    wanted = output_tokens(rows)
    if made != wanted and workload != DUPLICATES:  # with duplicates, equal rows may be sent once
        return f"generated {made} tokens, not {wanted}"
    return ""


def say(words: str) -> None:
    print(f"# {words}", file=sys.stderr, flush=True)
