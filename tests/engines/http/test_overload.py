"""Rows over HTTP to an overloaded server with a known number of slots."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.servers.scripted_server import Asked, Deed, ScriptedServer, answer_to, refused
from vllm_tasks import RowError, VllmAPI
from vllm_tasks.engines import loop
from vllm_tasks.engines.http import attempts, capacity, servers
from vllm_tasks.engines.http.engine import HttpEngine
from vllm_tasks.errors import ServerUnavailable

SLOTS, WINDOW = 8, 64
XS = [str(i) for i in range(300)]
HANGING = ["300", "301", "700", "1100"]
ANSWERS = [answer_to(x) for x in XS]
Make = Callable[..., VllmAPI]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; the order of events stays the same."""
    monkeypatch.setattr(attempts, "BACKOFF_BASE", 0.02)
    monkeypatch.setattr(attempts, "BACKOFF_LIMIT", 0.2)
    monkeypatch.setattr(capacity, "HOLD", 0.2)
    monkeypatch.setattr(capacity, "GROW_EVERY", 0.05)


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
    """A script that works on `slots` requests at once and refuses more, or all of them while it is `out`."""

    refusal: Deed
    service: float = 0.02
    slots: int = SLOTS
    out: bool = False
    working: int = 0
    refused: list[str] = field(default_factory=list)

    async def __call__(self, asked: Asked) -> Deed:
        if asked.body is None:
            return None
        if self.out or self.working >= self.slots:
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
    """Rows beyond its slots are refused at first, and hardly any from then on; none is an error."""
    server.script = slots = Slots(refusal)
    assert api(server.url).predict_batches(XS) == ANSWERS
    assert WINDOW - SLOTS <= len(slots.refused) < WINDOW + len(XS) // 3


def test_an_outage_costs_what_was_under_way_and_a_few_requests(server: ScriptedServer, api: Make) -> None:
    """While a server refuses everything, one row at a time probes it; then all rows complete."""
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
    """After 429 with Retry-After no other row is sent until one completes."""
    server.script = slots = Slots(refused(429, "come back", Retry_After="1"), out=True)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(server.url, max_in_flight=4).predict_batches, XS[:20])
        server.wait_until(lambda: len(slots.refused) == 4)
        slots.out = False
        assert call.result(timeout=60) == ANSWERS[:20]
    assert server.posts[4].at - server.posts[0].at >= 1


def test_a_server_that_works_on_rows_is_not_given_up(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that take longer than the grace period are waited for, while all other rows are refused."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.2")
    server.script = Slots(refused(429, "slow down"), service=0.8)
    assert api(server.url).predict_batches(XS[:20]) == ANSWERS[:20]


def test_a_row_that_is_always_refused_ends_as_an_error(server: ScriptedServer, api: Make) -> None:
    """A row that is refused again and again while others complete is an error of its own."""

    async def script(asked: Asked) -> Deed:
        await asyncio.sleep(0.02)
        return refused(429, "too large for your quota") if asked.prompt == "100" else None

    server.script = script
    results = api(server.url, max_in_flight=4).predict_batches(XS, on_error="return")
    (error,) = [result for result in results if isinstance(result, RowError)]
    assert (error.index, error.kind, error.retryable) == (100, "server", True)
    assert "too large for your quota" in error.message


def test_a_search_for_a_server_leaves_its_room_growing(server: ScriptedServer, api: Make) -> None:
    """A server that refused, was lost and was found again gets rows after its pause."""

    async def found_again() -> None:
        engine = HttpEngine(api(server.url).engine_config())
        await engine.start()
        try:
            far = await engine._servers.take_slot()
            far.capacity.refuse(retry_after=0.5)
            engine._servers.lose(far, "away")
            engine._servers.release(far)
            async with asyncio.timeout(10):
                assert await engine._servers.take_slot() is far
        finally:
            await engine.close()

    loop.run(found_again())


def test_a_server_with_room_takes_what_another_one_refuses(server: ScriptedServer, api: Make) -> None:
    """Of two servers the full one keeps its slots busy, and the other one gets all other rows."""
    with ScriptedServer(lambda _: asyncio.sleep(0.02)) as other:
        server.script = slots = Slots(refused(429, "slow down"), service=0.2)
        assert api(server.url, other.url).predict_batches(XS) == ANSWERS
        assert len(other.posts) > 200
        assert len(slots.refused) < WINDOW + 20


def test_a_queue_that_is_longer_than_the_timeout_is_cut(server: ScriptedServer, api: Make) -> None:
    """If rows wait at the server until they time out, fewer are sent, and most complete."""
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


def test_rows_that_never_end_do_not_cut_the_places_of_others(server: ScriptedServer, api: Make) -> None:
    """A row that times out while later rows complete is slow by itself: no slots are removed."""
    busy: list[int] = []

    async def script(asked: Asked) -> None:
        if asked.body is None:  # a busy machine may make the client look whether the server is healthy
            return
        busy.append(server.open)
        await asyncio.sleep(3600 if asked.prompt in HANGING else 0.1 + int(asked.prompt) % 20 / 100)

    server.script = script
    xs = [str(i) for i in range(1500)]
    results = api(server.url, timeout=1.5).predict_batches(xs, on_error="return")
    timed_out = {xs[i] for i, result in enumerate(results) if isinstance(result, RowError)}
    assert timed_out >= set(HANGING)  # a machine that stops for longer than the timeout adds those under way
    assert max(busy[900:-100]) >= WINDOW - 4


def test_a_long_row_does_not_hold_up_the_others_after_an_outage(server: ScriptedServer, api: Make) -> None:
    """The only row that the server worked on while it refused all others takes until they are completed."""
    began = time.monotonic()
    completed = asyncio.Event()
    working = 0

    async def script(asked: Asked) -> Deed:
        nonlocal working
        if asked.prompt == "0":
            await completed.wait()
        elif time.monotonic() - began < 1:
            return refused(429, "out")
        working += 1
        if working == len(XS) - 1:
            completed.set()
        return None

    server.script = script
    assert api(server.url, timeout=60).predict_batches(XS) == ANSWERS


def test_refusals_after_timeouts_are_over_when_they_are_over(server: ScriptedServer, api: Make) -> None:
    """A server that hung, and then refused all rows for a while, soon has all its slots in use again."""
    began = time.monotonic()
    busy: list[int] = []

    async def script(asked: Asked) -> Deed:
        since = time.monotonic() - began
        if since < 0.4:
            await asyncio.sleep(3600)
        if since < 1:
            return refused(429, "starting")
        if asked.body is not None:
            busy.append(server.open)
        await asyncio.sleep(0.05)
        return None

    server.script = script
    assert api(server.url, timeout=0.5, retries=5).predict_batches(XS) == ANSWERS
    assert max(busy) >= WINDOW // 2, busy


def test_rows_do_not_wait_at_a_throttled_server_while_another_idles(
    server: ScriptedServer, api: Make
) -> None:
    """A server with two slots gets two rows, and the other one gets the rest at once."""
    with ScriptedServer(lambda _: asyncio.sleep(0.02)) as quick:
        server.script = slots = Slots(refused(429, "too many"), service=0.5, slots=2)
        assert api(server.url, quick.url).predict_batches(XS) == ANSWERS
        assert len(quick.posts) > len(XS) * 3 // 4
        assert len(slots.refused) < WINDOW + 20


def test_servers_that_were_away_have_their_share_again(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If three of four servers are away for a moment, no row fails, and all four work at the end."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.1)

    async def script(_: Asked) -> None:
        await asyncio.sleep(0.05)

    server.script = script
    with ScriptedServer(script) as a, ScriptedServer(script) as b, ScriptedServer(script) as c:
        with ThreadPoolExecutor(1) as threads:
            model = api(server.url, a.url, b.url, c.url, max_in_flight=4)
            call = threads.submit(model.predict_batches, XS)
            server.wait_until(lambda: len(server.posts) > 10)
            for each in (a, b, c):
                each.stop()
            time.sleep(0.3)
            before = [len(each.posts) for each in (a, b, c)]
            for each in (a, b, c):
                each.start()
            assert call.result(timeout=60) == ANSWERS
        assert all(len(each.posts) > seen + 20 for each, seen in zip((a, b, c), before, strict=True))


FILES = """
import os, resource, sys
from vllm_tasks import VllmAPI
model = VllmAPI(identifier="m", api_url=sys.argv[1], model="m", max_in_flight=200, retries=0)
if sys.argv[4] == "under way":
    model.predict("x")
soft, hard = (len(os.listdir("/dev/fd")) + int(n) for n in sys.argv[2:4])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(model.predict_batches([str(i) for i in range(400)]) == [f" {i}!" for i in range(400)])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "when", "peak", "told"),
    [
        (40, 999, "at first", 200, ""),
        (80, 80, "at first", 50, "rows are in flight"),
        (20, 20, "under way", 22, ""),
    ],
)
def test_rows_do_not_need_more_files_than_may_be_open(
    server: ScriptedServer, soft: int, hard: int, when: str, peak: int, told: str
) -> None:
    """The soft limit is raised; where it may not be, fewer rows are in flight; no server is blamed."""
    server.script = lambda _: asyncio.sleep(0.1)
    command = [sys.executable, "-c", FILES, server.url, str(soft), str(hard), when]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.stdout == "True\n", ran.stderr
    assert told in ran.stderr
    assert "no server responds" not in ran.stderr
    assert peak / 2 < server.peak <= peak


def test_a_server_that_refuses_all_is_unavailable(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the grace period the call fails with the completed rows, and no row is called failed."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
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


def test_each_call_has_its_patience(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call after one that was refused until its end does not fail at its first refusal."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    server.script = slots = Slots(refused(429, "out of quota"), out=True)
    with pytest.raises(ServerUnavailable):
        api(server.url).predict("0")
    time.sleep(0.6)
    with ThreadPoolExecutor(1) as threads:
        seen = len(slots.refused)
        call = threads.submit(api(server.url).predict, "0")
        server.wait_until(lambda: len(slots.refused) > seen)
        slots.out = False
        assert call.result(timeout=60) == ANSWERS[0]
