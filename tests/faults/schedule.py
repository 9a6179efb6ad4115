"""All runs of the long form, by name: their kills and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.faults import absences, clocks, cuts, disks, engines, kills, storms
from tests.faults.ground import Ground
from tests.faults.ledger import Figures
from tests.faults.proxy import FAULTS
from tests.places import KINDS

Run = Callable[[Ground], Figures]

SHARES = {"flow": 0.5, "postgresql": 0.16, "engine": 0.12, "server": 0.08, "ray": 0.1, "ray-real": 0.04}
"""Of the kills. Those of real engines are few, because each costs a start."""
MINUTE = 60.0


def runs(all_kills: int) -> Iterator[tuple[str, Run]]:
    """Names and runs, in their order."""
    yield from killing(all_kills)
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
    for kind in KINDS:
        yield "clock", partial(over, clocks.jump, kind)
    yield "prefect", lambda ground: absences.away(ground, "lake", "killed", MINUTE)
    yield "prefect", lambda ground: absences.away(ground, "sqlite", "frozen", MINUTE)
    yield "prefect", lambda ground: absences.away_from_a_pool(ground, "killed", MINUTE)


def killing(all_kills: int) -> Iterator[tuple[str, Run]]:
    """The runs with kills, each with its share of them."""
    number = {name: max(1, round(share * all_kills)) for name, share in SHARES.items()}
    for i, kind in enumerate(KINDS):
        each = len(range(i, number["flow"], len(KINDS)))
        yield "flow", lambda ground, kind=kind, each=each: kills.flows(ground, kind, each)
    yield "postgresql", lambda ground: kills.databases(ground, number["postgresql"])
    yield "engine", lambda ground: engines.local(ground, "lake", number["engine"])
    yield "server", lambda ground: engines.server(ground, "sqlite", number["server"])
    yield "ray", lambda ground: engines.on_ray(ground, "postgres", number["ray"], real=False)
    yield "ray", lambda ground: engines.on_ray(ground, "lake", number["ray-real"], real=True)


def over(run: Callable[[Ground, str], Figures], kind: str, ground: Ground) -> Figures:
    return run(ground, kind)


def cuts_of(kind: str, faults: tuple[str, ...], ground: Ground) -> Figures:
    return cuts.cut(ground, kind, *faults)
