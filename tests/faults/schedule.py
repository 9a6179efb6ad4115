"""All runs of the long form, by name: their kills and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tests.faults import absences, clocks, cuts, disks, engines, gateways, hangs, kills, memory, storms
from tests.faults.ground import Ground
from tests.faults.ledger import Figures
from tests.faults.proxy import FAULTS
from tests.faults.sources import SOURCES, flow_reads
from tests.faults.work import KINDS_OF_WORK
from tests.places import KINDS

Run = Callable[[Ground], Figures]

SHARES = {
    "flow": 0.21, "work": 0.15, "sources": 0.25, "postgresql": 0.08, "gateway": 0.06, "memory": 0.05,
    "engine": 0.06, "server": 0.05, "ray": 0.07, "ray-real": 0.02,
}  # fmt: skip
"""Of the kills. Those of real engines are few, because each costs a start."""
MINUTE = 60.0


@dataclass(frozen=True)
class Others:
    """Programs of other environments that take part, if they are there."""

    litellm: str = ""
    """LiteLLM's program."""
    prefect: str = ""
    """The Python of an environment with another Prefect, whose server takes part."""


def runs(all_kills: int, others: Others) -> Iterator[tuple[str, Run]]:
    """Names and runs, in their order."""
    number = {name: max(1, round(share * all_kills)) for name, share in SHARES.items()}
    yield from of_flows(number)
    yield from of_services(number, others)
    for i, fault in enumerate(FAULTS):
        yield "network", partial(cuts_of, KINDS[i % 3], (fault,))
    yield "network", partial(cuts_of, "lake", FAULTS)
    yield "network", cuts.cut_database
    misdeeds = (
        storms.tell_too_many, storms.is_away, storms.is_busy, storms.fails_for_ever, storms.miscounts,
        storms.names_another_model, storms.forgets_its_model, storms.answers_html,
    )  # fmt: skip
    for i, misdeed in enumerate(misdeeds):
        yield "storms", partial(over, misdeed, KINDS[i % 3])
    for kind in ("lake", "sqlite"):
        yield "disks", partial(over, disks.full, kind)
        yield "disks", partial(over, disks.read_only, kind)
    for kind in ("postgres", "lake"):
        yield "disks", partial(over, disks.without_room, kind)
    for kind in KINDS:
        yield "clock", partial(over, clocks.jump, kind)
    yield from of_prefect(others)


def of_flows(number: dict[str, int]) -> Iterator[tuple[str, Run]]:
    """The flow is killed over each kind of store, of work and of source."""
    for kind, each in zip(KINDS, shared(number["flow"], len(KINDS)), strict=True):
        yield "flow", partial(kills.flows, kind=kind, kills=each)
    for i, each in enumerate(shared(number["work"], len(KINDS_OF_WORK))):
        yield "work", partial(kills.flows, kind=KINDS[i % 3], kills=each, work=KINDS_OF_WORK[i])
    for i, each in enumerate(shared(number["sources"], len(SOURCES))):
        yield "sources", partial(flow_reads, source=SOURCES[i], kind=KINDS[i % 3], kills=each)


def of_services(number: dict[str, int], others: Others) -> Iterator[tuple[str, Run]]:
    """What the flow uses is killed, hangs, or has no memory."""
    yield "postgresql", partial(kills.databases, kills=number["postgresql"])
    ours, foreign = shared(number["gateway"], 2) if others.litellm else (number["gateway"], 0)
    yield "gateway", partial(gateways.killed, kind="postgres", kills=ours)
    if foreign:
        yield "gateway", partial(gateways.killed, kind="lake", kills=foreign, litellm=others.litellm)
    of_flow, of_engine = shared(number["memory"], 2)
    yield "memory", partial(memory.flows, kind="sqlite", kills=of_flow)
    yield "memory", partial(memory.engine, kind="lake", kills=of_engine)
    yield "hangs", partial(hangs.scripted, kind="sqlite", hangs=3)
    yield "hangs", partial(hangs.real, kind="postgres", hangs=2)
    yield "engine", partial(engines.local, kind="lake", kills=number["engine"])
    yield "server", partial(engines.server, kind="sqlite", kills=number["server"])
    yield "ray", partial(engines.on_ray, kind="postgres", kills=number["ray"], real=False)
    yield "ray", partial(engines.on_ray, kind="lake", kills=number["ray-real"], real=True)


def of_prefect(others: Others) -> Iterator[tuple[str, Run]]:
    """Prefect's server goes away, ours and one of another version."""
    for kind, how in (("lake", "killed"), ("sqlite", "frozen")):
        yield "prefect", partial(absences.away, kind=kind, how=how, seconds=MINUTE)
    yield "prefect", partial(absences.away_from_a_pool, how="killed", seconds=MINUTE)
    if others.prefect:
        away = partial(absences.away, kind="lake", how="killed", seconds=MINUTE)
        yield "prefect", partial(away, python=others.prefect)


def shared(number: int, parts: int) -> list[int]:
    """So many kills in parts of about one size, each of one at least."""
    return [max(1, len(range(i, number, parts))) for i in range(parts)]


def over(run: Callable[[Ground, str], Figures], kind: str, ground: Ground) -> Figures:
    return run(ground, kind)


def cuts_of(kind: str, faults: tuple[str, ...], ground: Ground) -> Figures:
    return cuts.cut(ground, kind, *faults)
