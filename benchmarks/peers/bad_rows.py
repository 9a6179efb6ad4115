"""The result of each side for 100 rows, one of which is longer than the model's limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import results
from benchmarks.children import ChildFailed
from benchmarks.peers.field import Field, say
from benchmarks.peers.plan import BAD
from benchmarks.peers.plan import BAD_ROWS as ROWS
from benchmarks.peers.side import Outcome, reason

TIME_LIMIT = 240.0
"""Seconds after which a side is reported as not finished."""


@dataclass(frozen=True)
class Ending:
    """How the rows of a side ended, and its error if the run failed."""

    name: str
    outcome: Outcome

    def cells(self) -> tuple[str, ...]:
        found = self.outcome
        without = ROWS - found.completed - found.errors
        words = found.died or ("every row ends" if without == 0 else "")
        return self.name, str(found.completed), str(found.errors), str(without), results.one_line(words)


def observe(field: Field, names: Iterable[str]) -> list[Ending]:
    """One run of each live side; a side that does not survive it is removed."""
    if not field.plan.has_workload(BAD):
        return []
    rows = field.plan.rows(BAD, 0)
    endings = []
    for name in field.here(names):
        side = field.sides[name]
        try:
            outcome = side.run(rows, TIME_LIMIT).outcome
        except TimeoutError:
            outcome = Outcome(TIME_LIMIT, 0, 0, died=f"not finished after {TIME_LIMIT:g} s")
            field.forget(side)
        except ChildFailed as error:
            outcome = Outcome(0.0, 0, 0, died=reason(error))
            field.forget(side)
        say(f"bad: {name}: {outcome}")
        endings.append(Ending(name, outcome))
    return endings


def table(endings: Iterable[Ending]) -> str:
    head = ("side", "rows with an output", "rows with an error", "rows with neither", "")
    lines = [ending.cells() for ending in endings]
    if not lines:
        return ""
    title = f"### A row that is refused (`bad`): 1 of {ROWS} is longer than the model's limit"
    return f"{title}\n\n{results.table(head, lines)}"
