"""Rows over HTTP to a server that is asked for more than it takes, with a known number of slots."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.scripted_server import Asked, Deed, ScriptedServer, answer_to, refused
from vllm_tasks import RowError, ServerUnavailable, VllmAPI, loop
from vllm_tasks.engines import room, tries
from vllm_tasks.engines.http import HttpEngine

SLOTS, WINDOW = 8, 64
XS = [str(i) for i in range(300)]
ANSWERS = [answer_to(x) for x in XS]
Make = Callable[..., VllmAPI]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; the order of events stays what it is."""
    monkeypatch.setattr(tries, "BACKOFF_BASE", 0.02)
    monkeypatch.setattr(tries, "BACKOFF_LIMIT", 0.2)
    monkeypatch.setattr(room, "HOLD_BASE", 0.02)
    monkeypatch.setattr(room, "HOLD_LIMIT", 0.2)
    monkeypatch.setattr(room, "GROW_EVERY", 0.05)


@pytest.fixture
def api() -> Iterator[Make]:
    """Makes a `VllmAPI` without retries, so that each refusal that counted would be an error."""
    made: list[VllmAPI] = []

    def make(*urls: str, **fields: Any) -> VllmAPI:
        fields = {"model": "m", "retries": 0, "max_in_flight": WINDOW, **fields}
        made.append(VllmAPI(identifier="a", api_url=list(urls), **fields))
        return made[-1]

    yield make
    for model in made:
        model.close()


@dataclass
class Slots:
    """A script that works on `SLOTS` requests at once, and refuses more; all of them while it is `out`."""

    refusal: Deed
    service: float = 0.02
    out: bool = False
    working: int = 0
    refused: list[str] = field(default_factory=list)

    async def __call__(self, asked: Asked) -> Deed:
        if asked.body is None:
            return None
        if self.out or self.working >= SLOTS:
            self.refused.append(asked.prompt)
            return self.refusal
        self.working += 1
        try:
            await asyncio.sleep(self.service)
        finally:
            self.working -= 1
        return None


@pytest.mark.parametrize(
    "refusal",
    [refused(429, "slow down"), refused(429, "slow down", Retry_After="0"), refused(503, "overloaded")],
)
def test_a_server_that_refuses_some_rows_answers_all_and_is_not_stormed(
    server: ScriptedServer, api: Make, refusal: Deed
) -> None:
    """What is beyond its slots is refused at first, and hardly a row from then on; none is an error."""
    server.script = slots = Slots(refusal)
    assert api(server.url).predict_batches(XS) == ANSWERS
    assert WINDOW - SLOTS <= len(slots.refused) < WINDOW + len(XS) // 3


def test_an_outage_costs_what_was_under_way_and_a_few_requests(server: ScriptedServer, api: Make) -> None:
    """While a server refuses everything, one row at a time asks whether it is back; then all are answered."""
    server.script = slots = Slots(refused(503, "overloaded"), service=0.05)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(server.url).predict_batches, XS)
        server.wait_until(lambda: len(server.posts) > 100)
        slots.out = True
        time.sleep(0.2)
        before = len(slots.refused)
        time.sleep(1)
        assert 0 < len(slots.refused) - before < 20  # one each 0.1 to 0.2 s
        slots.out = False
        assert call.result(timeout=60) == ANSWERS


def test_no_row_is_sent_before_the_time_that_the_server_has_said(server: ScriptedServer, api: Make) -> None:
    """After 429 with Retry-After no other row follows, as long as none is answered."""
    server.script = slots = Slots(refused(429, "come back", Retry_After="1"), out=True)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(server.url, max_in_flight=4).predict_batches, XS[:20])
        server.wait_until(lambda: len(slots.refused) == 4)
        slots.out = False
        assert call.result(timeout=60) == ANSWERS[:20]
    told, *_, last = [asked.at for asked in server.posts[:4]]
    assert server.posts[4].at - told >= 1
    assert last - told < 1


def test_a_server_that_works_on_rows_is_not_given_up(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that take longer than the patience are waited for, while all other rows are refused."""
    monkeypatch.setenv("VLLM_TASKS_PATIENCE", "0.2")
    server.script = Slots(refused(429, "slow down"), service=0.8)
    assert api(server.url).predict_batches(XS[:20]) == ANSWERS[:20]


def test_a_row_that_is_always_refused_ends_as_an_error(server: ScriptedServer, api: Make) -> None:
    """A row that is refused while others are answered over and over is refused for its own sake."""

    async def script(asked: Asked) -> Deed:
        await asyncio.sleep(0.02)
        return refused(429, "too large for your quota") if asked.prompt == "100" else None

    server.script = script
    results = api(server.url, max_in_flight=4).predict_batches(XS, on_error="return")
    (error,) = [result for result in results if isinstance(result, RowError)]
    assert (error.index, error.kind, error.retryable) == (100, "server", True)
    assert "too large for your quota" in error.message


def test_a_search_for_a_server_leaves_its_room_growing(server: ScriptedServer, api: Make) -> None:
    """One that refused, was lost and is found again lets rows in when its while is over."""

    async def found_again() -> None:
        engine = HttpEngine(api(server.url).engine_config())
        await engine.start()
        try:
            (far,) = engine._servers.all
            async with far.room:
                far.room.refuse(retry_after=0.5)
            engine._servers.lose(far)
            assert await engine._servers.pick() is far
            async with asyncio.timeout(10), far.room:
                pass
        finally:
            await engine.close()

    loop.run(found_again())


def test_a_server_with_room_takes_what_another_one_refuses(server: ScriptedServer, api: Make) -> None:
    """Of two servers the one that is full keeps its slots busy, and the other one has all the other rows."""
    with ScriptedServer(lambda _: asyncio.sleep(0.02)) as other:
        server.script = slots = Slots(refused(429, "slow down"), service=0.2)
        assert api(server.url, other.url).predict_batches(XS) == ANSWERS
        assert len(other.posts) > 200
        assert len(slots.refused) < WINDOW + 20


def test_a_queue_that_is_longer_than_the_timeout_is_cut(server: ScriptedServer, api: Make) -> None:
    """Where rows wait at the server until they time out, fewer are sent, and most are answered."""
    slots = asyncio.Semaphore(SLOTS)

    async def script(asked: Asked) -> Deed:
        if asked.body is not None:
            async with slots:
                await asyncio.sleep(0.1)  # with 64 rows there: 0.8 s
        return None

    server.script = script
    results = api(server.url, timeout=0.5, retries=5).predict_batches(XS, on_error="return")
    errors = [result for result in results if isinstance(result, RowError)]
    assert len(errors) < len(XS) // 10
    assert len(server.posts) < 2 * len(XS)


def test_a_server_that_refuses_all_is_unavailable(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the patience the call fails with what has been answered, and no row is called failed."""
    monkeypatch.setenv("VLLM_TASKS_PATIENCE", "0.5")
    server.script = slots = Slots(refused(429, "out of quota"))
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(server.url, retries=5).predict_batches, XS)
        server.wait_until(lambda: len(server.posts) > 100)
        slots.out = True
        with pytest.raises(ServerUnavailable, match=r"for 0.5 s .*out of quota") as raised:
            call.result(timeout=60)
    results = raised.value.results
    assert results is not None
    assert None in results
    assert not any(isinstance(result, RowError) for result in results)
