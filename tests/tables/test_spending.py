"""A budget of tokens, time or money ends a run: all that is finished is kept, the next run does the rest."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, answer_to, refused, usual
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.results import Report
from vllm_tasks.tables.arguments import is_repeatable, share_of_budget
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.prices import Prices
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.tally import Tally

ROWS = 200
TOKENS = 3 + 5
"""Of a row, as the scripted server counts them."""
IN_FLIGHT = 4


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    place.fill_texts(*(f"t{i}" for i in range(ROWS)))

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(0.005)

    server.script = script
    with VllmAPI(
        identifier="m", api_url=server.url, db=place.db, retries=0, max_in_flight=IN_FLIGHT
    ) as model:
        yield model


def run(model: VllmAPI, **options: Any) -> Report:
    return model.predict_in_db("text", "rows", **options)


@pytest.mark.parametrize(
    ("budget", "stopped_by"),
    [
        ({"max_total_tokens": 40 * TOKENS}, "max_total_tokens"),
        ({"max_cost": 40 * 5.0, "prices": {"per_million_completion_tokens": 1e6}}, "max_cost"),
    ],
)
def test_a_spent_budget_keeps_what_is_finished_and_the_next_run_does_the_rest(
    model: VllmAPI, place: Place, server: ScriptedServer, budget: dict[str, Any], stopped_by: str
) -> None:
    """No row that was finished is sent again, and the counts of both runs are those of the table."""
    first = run(model, **budget)
    assert first.stopped_by == stopped_by
    assert 40 <= first.processed <= 40 + 2 * IN_FLIGHT
    assert first.processed == len(place.answers())
    assert (first.rows, first.up_to_date, first.remaining) == (ROWS, None, ROWS - first.processed)
    assert len(server.posts) <= first.processed + 2 * IN_FLIGHT
    assert f"stopped by {stopped_by} with {first.remaining} rows left" in str(first)
    finished = {f"t{key}" for key in place.answers()}
    sent = len(server.posts)
    rest = run(model)
    assert not finished & {asked.prompt for asked in server.posts[sent:]}
    assert (rest.stopped_by, rest.remaining, rest.up_to_date) == (None, 0, first.processed)
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(ROWS)}


def test_a_run_ends_in_time(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """Rows that are in flight then are cancelled, whatever they would still take."""

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > 20:
            await asyncio.sleep(3600)

    server.script = script
    report = run(model, max_seconds=2)
    assert report.stopped_by == "max_seconds"
    assert report.processed == len(place.outputs()) <= 20
    assert report.remaining == ROWS - report.processed
    server.wait_until(lambda: not server.open)


def test_a_budget_that_suffices_ends_nothing(model: VllmAPI) -> None:
    """Nor does one that the last row uses up."""
    report = run(model, max_total_tokens=ROWS * TOKENS, max_seconds=3600, max_cost=1, prices={"per_hour": 1})
    assert (report.processed, report.stopped_by, report.remaining) == (ROWS, None, 0)


def test_what_remains_is_counted_within_the_call(model: VllmAPI) -> None:
    """With a limit or keys, rows beyond them are not left to the next run; changed rows are not counted."""
    budget = {"max_total_tokens": 20 * TOKENS}
    limited = run(model, **budget, limit=100)
    assert limited.remaining == 100 - limited.processed
    again = run(model, **budget, overwrite=True)
    assert again.remaining == ROWS - again.processed
    changed = run(model, **budget, refresh="changed")
    assert (changed.stopped_by, changed.remaining) == ("max_total_tokens", None)
    assert "with some rows left" in str(changed)


def test_failed_rows_of_an_ended_run_are_judged_as_during_a_run(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """Refusals come sooner than answers, so their fraction of the finished rows says nothing then."""

    refusals = itertools.count(1)
    all_refused = asyncio.Event()

    async def script(asked: Asked) -> Reply | None:
        if asked.body and int(asked.prompt[1:]) % 5 == 0:
            if next(refusals) == ROWS // 5:
                all_refused.set()
            return refused(400, "no")
        if asked.body:
            await all_refused.wait()
            await asyncio.sleep(0.5 + int(asked.prompt[1:]) * 0.02)  # the refusals arrive
        return None

    server.script = script
    with model.model_copy(update={"max_in_flight": 256}) as fast:
        report = run(fast, max_failed=0.3, max_total_tokens=TOKENS)
    assert report.stopped_by
    assert report.failed > 0.3 * report.processed


def test_tokens_that_nobody_counts_are_no_budget(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """A server without `usage` would let a run go on for ever; the rows that are finished are kept."""

    def script(asked: Asked) -> Reply | None:
        if not asked.body or "prompt" not in asked.body:
            return None
        reply = usual(asked)
        del reply.body["usage"]
        return reply

    server.script = script
    with pytest.raises(InvalidCall, match=r"max_total_tokens.*usage"):
        run(model, max_total_tokens=10**9)
    assert place.answers()
    assert run(model, max_cost=1, prices={"per_hour": 0.01}).stopped_by is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_total_tokens": 0}, "max_total_tokens=0"),
        ({"max_total_tokens": 1.5}, "max_total_tokens=1.5"),
        ({"max_seconds": 0}, "max_seconds=0"),
        ({"max_seconds": True}, "max_seconds=True"),
        ({"max_cost": float("inf")}, "max_cost=inf"),
        ({"max_cost": 5}, "max_cost=5 needs a price.*VLLM_TASKS_PRICE_PER_HOUR"),
        ({"max_cost": 5, "prices": {"per_hour": 0}}, "needs a price"),
        ({"prices": {"hour": 2}}, "'hour'.*per_hour"),
        ({"prices": {"per_hour": -1}}, "per_hour=-1"),
        ({"prices": 2.5}, "prices=2.5"),
        ({"max_total_token": 5}, "did you mean 'max_total_tokens'"),
    ],
)
def test_wrong_budgets_are_refused(wrong: dict[str, Any], words: str, tmp_path: Any) -> None:
    """Before any row is sent, and with the way out."""
    model = VllmAPI(identifier="m", api_url="http://127.0.0.1:1", model="x", db={"url": str(tmp_path)})
    with pytest.raises(InvalidCall, match=words):
        run(model, **wrong)


def test_prices_are_those_of_the_call_or_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost is the sum over an hour and over both kinds of tokens."""
    prices = Prices.of({"per_hour": 3.6, "per_million_prompt_tokens": 1, "per_million_completion_tokens": 10})
    assert prices.cost(1000, 500_000, 100_000) == pytest.approx(1 + 0.5 + 1)
    monkeypatch.setenv("VLLM_TASKS_PRICE_PER_HOUR", "7.2")
    assert Prices.of(None).cost(1000, 500_000, 100_000) == pytest.approx(2)
    assert Prices.of({"per_million_prompt_tokens": 1}).cost(1000, 10**6, 0) == pytest.approx(1)


def test_time_costs_money() -> None:
    """With a price per hour, a budget of money is one of time."""
    tally = Tally(started=time.monotonic() - 1800)
    prices = Prices(per_hour=2.0)
    assert Budget(None, max_cost=0.9, prices=prices).spent(tally) == "max_cost"
    assert Budget(None, max_cost=1.1, prices=prices).spent(tally) is None


def test_shards_share_tokens_and_money_and_each_has_all_of_the_time() -> None:
    """So all shards together spend what the call may."""
    options = {"max_total_tokens": 100, "max_cost": 9.0, "max_seconds": 60.0}
    share = {**options, **share_of_budget(options, 3)}
    assert share == {"max_total_tokens": 33, "max_cost": 3.0, "max_seconds": 60.0}
    assert share_of_budget({}, 3) == {"max_total_tokens": None, "max_cost": None}
    assert share_of_budget({"max_total_tokens": 2}, 3)["max_total_tokens"] == 1
    with pytest.raises(InvalidCall, match="max_cost"):
        share_of_budget({"max_cost": "9"}, 3)


@pytest.mark.parametrize(
    ("options", "repeatable"),
    [({}, True), ({"limit": 5}, False), ({"overwrite": True}, False), ({"max_cost": 1.0}, False)],
)
def test_a_call_with_a_budget_is_attempted_once(options: dict[str, Any], repeatable: bool) -> None:
    """Another attempt would spend the budget again."""
    assert is_repeatable(options) is repeatable


def test_the_progress_of_an_ended_run_says_so() -> None:
    """In place of the time left."""
    assert str(Progress(100, 50, 0, 10, 1.0, "max_cost")).endswith("tokens/s, stopped by max_cost")
