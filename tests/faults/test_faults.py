"""The short form of `make faults`: one or two faults of each kind, at moments that a seed chooses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import (
    absences,
    clocks,
    cuts,
    disks,
    gateways,
    hangs,
    kills,
    ledger,
    memory,
    sources,
    storms,
)
from tests.faults.ground import Ground, Lacking, made
from tests.faults.ledger import Broken, Ledger
from tests.faults.proxy import FAULTS
from tests.faults.work import KINDS_OF_WORK, Work
from tests.places import Place
from tests.servers.postgres import binaries

SEED = random.randrange(10**6)
"""Told when something breaks."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """One Prefect server, one PostgreSQL and one process to fork jobs from, for all."""
    if binaries() is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with made(tmp_path_factory.mktemp("faults"), SEED) as ground:
        yield ground


def test_a_killed_flow_goes_on_by_the_same_call(ground: Ground) -> None:
    """Committed rows stay and are not sent again; the others are, and each row is there once."""
    assert kills.flows(ground, "sqlite", 2).faults == 2


@pytest.mark.parametrize("work", KINDS_OF_WORK[-2:], ids=lambda work: work.name)
def test_a_killed_flow_of_other_work_goes_on(ground: Ground, work: Work) -> None:
    """Rows whose answers are sent back, and rows with columns beside them, are as safe as others."""
    assert kills.flows(ground, "lake", 1, work).faults == 1


SOURCES = [("DuckDB", "postgres"), ("a table in memory (stream)", "sqlite")]


@pytest.mark.parametrize(("source", "kind"), SOURCES)
def test_a_killed_flow_that_reads_elsewhere_goes_on(ground: Ground, source: str, kind: str) -> None:
    """Also if the source was a stream that could be read only once: the next call has its own."""
    assert sources.flow_reads(ground, source, kind, 1).faults == 1


def test_a_gateway_is_killed(ground: Ground) -> None:
    """What was on its way is sent again, and nothing else."""
    assert gateways.killed(ground, "postgres", 2).faults == 2


def test_an_engine_hangs(ground: Ground) -> None:
    """It is ended, and another one gets the rows that it had."""
    assert hangs.scripted(ground, "lake", 1).faults == 1


def test_a_host_has_no_memory_left(ground: Ground) -> None:
    """The kernel kills the flow, and the same call resumes."""
    try:
        assert memory.flows(ground, "sqlite", 1).faults == 1
    except Lacking as error:
        pytest.skip(str(error))


def test_postgresql_is_killed(ground: Ground) -> None:
    """The run waits for it, resumes, and sends nothing again."""
    figures = kills.databases(ground, 1)
    assert (figures.faults, figures.again) == (1, 0)


def test_a_network_cuts_and_repeats_answers(ground: Ground) -> None:
    """Resets, black holes, drips, halves and second copies: each row ends with its own answer."""
    assert cuts.cut(ground, "lake", *FAULTS, rows=200).faults > 0


def test_an_answer_sent_twice_is_not_the_answer_to_the_next_request(ground: Ground) -> None:
    """aiohttp would take the copy for the next response, and each row would get another row's answer."""
    assert cuts.cut(ground, "sqlite", "duplicate answer", rows=200).faults > 0


def test_a_storm_of_refusals(ground: Ground) -> None:
    """Temporary refusals cost requests and no rows."""
    assert storms.tell_too_many(ground, "postgres").faults > 0


def test_a_disk_is_full_and_has_room_again(ground: Ground) -> None:
    """The run resumes, or the same call does."""
    try:
        assert disks.full(ground, "lake").faults == 1
    except Lacking as error:
        pytest.skip(str(error))


def test_the_temporary_folder_is_full_and_has_room_again(ground: Ground) -> None:
    """Rows that are kept there wait for room as a commit does."""
    try:
        assert disks.without_room(ground, "postgres").again == 0
    except Lacking as error:
        pytest.skip(str(error))


@pytest.mark.long
def test_the_clock_is_set_back_and_then_the_database_lost(ground: Ground) -> None:
    """Rows committed before the jump do not count as rows of an earlier run and are not sent again."""
    try:
        assert clocks.jump(ground, "postgres").again == 0
    except Lacking as error:
        pytest.skip(str(error))


def test_prefects_server_goes_away_and_comes_back(ground: Ground) -> None:
    """The run resumes, or the same call does."""
    assert absences.away(ground, "sqlite", "killed", 4, rows=300).lost == 0


def test_the_check_sees_what_is_lost_doubled_changed_and_asked_too_often(tmp_path: Path) -> None:
    """A check that never fails would show nothing."""

    class Forged(Ledger):
        def committed(self, predict_id: str = "m") -> list[dict[str, object]]:
            rows = [{"id": i, "output": f" t{i}!", "_error": None} for i in range(self.rows)]
            if predict_id == ledger.UNDISTURBED:
                return rows
            return [rows[0], rows[0], {**rows[1], "output": " t0!"}]

    asked = ledger.Counter({0: 1, 1: 3})
    forged = Forged("forged", Place(str(tmp_path / "lake")), 3, 7, lambda: asked)
    forged.fault("a moment")
    with pytest.raises(Broken, match=r"(?s)--seed 7.*a moment.*1 lost: 2.*1 doubled: 0.*' t0!'.*\(1, 2\)"):
        forged.check()


def test_the_check_sees_what_one_life_asks_twice_and_a_reference_that_is_none(tmp_path: Path) -> None:
    """A death permits one more request of a row; an empty or failed undisturbed run shows nothing."""

    class Forged(Ledger):
        def committed(self, predict_id: str = "m") -> list[dict[str, object]]:
            if predict_id == ledger.UNDISTURBED:
                return [{"id": 1, "output": None, "_error": "refused: no"}]
            return [{"id": i, "output": None, "_error": "refused: no"} for i in range(2) if asked[i] > 2]

    asked = ledger.Counter({0: 2, 1: 1})
    forged = Forged("forged", Place(str(tmp_path / "lake")), 2, 7, lambda: asked)
    forged.death("a moment")
    asked.update((0, 1, 1))
    with pytest.raises(Broken) as caught:
        forged.check()
    for words in (
        "1 not in the undisturbed run: 0",
        "1 errors of the undisturbed run: 1",
        "2 asked oftener than 0 spare: (0, 1), (1, 1)",
    ):
        assert words in str(caught.value)
