"""The budget of failed rows depends on the rows read and sent first, never on the order of completion."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused
from vllm_tasks import VllmAPI
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.rows import Choice, Completion, Result, RowError
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.tally import Tally

GOOD = Completion((Choice("x"),))
BAD = RowError("refused", "no")


def finish(tally: Tally, keys: range, outcome: Result) -> None:
    for key in keys:
        tally.count((key,), outcome, outcome)


def read(rows: int) -> Tally:
    """Rows that were read and sent, of which none is finished."""
    tally = Tally()
    tally.begin(rows, [(key,) for key in range(rows)])
    return tally


@pytest.mark.parametrize(
    ("max_failed", "goes_on"),
    [(0.5, True), (0.2, True), (800, True), (None, True), (0.05, False), (50, False)],
)
def test_refusals_at_once_do_not_stop_a_run_whose_answers_take_longer(
    server: ScriptedServer, tmp_path: Any, max_failed: float | int | None, goes_on: bool
) -> None:
    """19.9 % are refused at once and the others complete later: a budget above that is not exceeded."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*(str(i) for i in range(2000)))

    async def script(asked: Asked) -> Reply | None:
        if asked.body and int(asked.prompt) * 199 % 1000 < 199:
            return refused(400, "no")
        await asyncio.sleep(0.3)
        return None

    server.script = script
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, retries=0) as model:
        if goes_on:
            report = model.predict_in_db("text", "rows", max_failed=max_failed)
            assert (report.succeeded, report.failed) == (1602, 398)
        else:
            with pytest.raises(TooManyFailed, match="rows failed, more than max_failed"):
                model.predict_in_db("text", "rows", max_failed=max_failed)
            assert len(server.posts) < 2000, "it stops early"


def test_rows_sent_first_must_all_have_failed() -> None:
    """Fifty failures do not stop a run while one of the first fifty rows is still in flight."""
    tally, budget = read(600), Budget(0.9)
    finish(tally, range(1, 200), BAD)
    assert budget.exceeded(tally, at_end=False) is None
    finish(tally, range(1), BAD)
    assert "first 200 rows all failed alike" in str(budget.exceeded(tally, at_end=False))


def test_one_row_that_never_ends_does_not_block_the_judgement() -> None:
    """Without that row the run stops as soon as more rows have failed than those read allow."""
    tally, budget = read(600), Budget(0.5)
    finish(tally, range(1, 400), BAD)
    assert "399 of 399 rows failed" in str(budget.exceeded(tally, at_end=False))


def test_chance_stops_no_run() -> None:
    """During a run a fraction may be exceeded within chance, at the end it may not."""
    tally = read(500)
    finish(tally, range(110), BAD)
    finish(tally, range(110, 500), GOOD)
    assert Budget(0.2).exceeded(tally, at_end=False) is None
    assert "110 of 500" in str(Budget(0.2).exceeded(tally, at_end=True))
    tally = read(500)
    finish(tally, range(200), BAD)
    assert Budget(0.2).exceeded(tally, at_end=False) is not None


def test_unreadable_lines_count_as_failed_rows() -> None:
    """A number of rows counts at once, a fraction at the end, of all rows of the source."""
    tally = read(100)
    finish(tally, range(100), GOOD)
    tally.unreadable, tally.unreadable_lines = 10, ["t.jsonl line 5: is no JSON"]
    assert Budget(10).exceeded(tally, at_end=False) is None
    assert Budget(9).exceeded(tally, at_end=False) is not None
    assert "10 lines could not be read" in str(Budget(0.05).exceeded(tally, at_end=True))
    assert "t.jsonl line 5: is no JSON" in str(Budget(0.05).exceeded(tally, at_end=True))
    tally.rows = 1000  # the others were done before
    assert Budget(0.05).exceeded(tally, at_end=True) is None


def test_nothing_failing_is_no_failure() -> None:
    assert Budget(0.0).exceeded(Tally(), at_end=True) is None


@pytest.mark.parametrize(("failed", "over"), [(29, False), (30, True)])
def test_exactly_the_fraction_that_is_allowed_passes(failed: int, over: bool) -> None:
    """As a float, 0.29 * 100 is less than 29."""
    tally = read(100)
    finish(tally, range(failed), BAD)
    finish(tally, range(failed, 100), GOOD)
    assert bool(Budget(0.29).exceeded(tally, at_end=True)) == over
