"""Over HTTP: servers that go and come, alone or behind a gateway."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engines.http.deeds import Make, by_prompt, lose_all, on_servers, once
from tests.servers.scripted_server import (
    MODEL,
    Asked,
    Deed,
    Raw,
    Reply,
    ScriptedServer,
    answer_to,
    hang,
    refused,
)
from vllm_tasks import RowError
from vllm_tasks.engines import loop as engine_loop
from vllm_tasks.engines import sharing
from vllm_tasks.engines.http import control, servers
from vllm_tasks.engines.http.servers import Servers
from vllm_tasks.errors import ServerUnavailable

pytestmark = pytest.mark.usefixtures("hasty")


# ---------------------------------------------------------------------- servers that go and come


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("model", [None, "m"])
def test_without_a_server_the_call_waits_for_the_patience_and_says_why(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None, retries: int
) -> None:
    """A server that cannot be reached ends the call after the grace period, with its URL and last reason."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.3")
    server.stop()
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match=rf"{server.url} for 0.3 s .*refused"):
        api(model=model, retries=retries).predict_batches([str(i) for i in range(20)])
    assert time.monotonic() - began >= 0.3


def test_an_unhealthy_server_is_not_a_server(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure of the server, a health check with 503 prolongs the wait, whatever else succeeds."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.3")
    failures = [Raw(reset=True)] * 2  # a control call is sent once more by itself

    def script(asked: Asked) -> Deed:
        if asked.path == "/health":
            return refused(503, "engine is dead")
        return failures.pop() if failures else None

    server.script = script
    with pytest.raises(ServerUnavailable, match=r"HTTP 503 from .*/health"):
        api(model=None).predict("x")


def test_a_server_that_comes_back_within_the_patience_answers_all(server: ScriptedServer, api: Make) -> None:
    """Rows wait for a server that is not there yet, and neither fail nor flood it."""
    server.stop()
    comes = threading.Timer(0.5, server.start)
    comes.start()
    xs = [str(i) for i in range(50)]
    assert api(model=None).predict_batches(xs) == [answer_to(x) for x in xs]
    comes.join()
    assert [a.path for a in server.requests].count("/health") <= 3


def test_a_server_restarted_in_the_middle_of_a_call_answers_all(server: ScriptedServer, api: Make) -> None:
    """Rows whose connection broke are sent again, and rows not yet sent wait."""
    server.script = lambda _: asyncio.sleep(0.02)
    xs = [str(i) for i in range(80)]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(max_in_flight=4, retries=5).predict_batches, xs)
        server.wait_until(lambda: len(server.posts) >= 20)
        server.stop()
        time.sleep(0.3)
        server.start()
        assert call.result(timeout=60) == [answer_to(x) for x in xs]


@pytest.mark.parametrize("retries", [0, 2])
def test_rows_under_way_when_a_server_dies_wait_for_it(
    server: ScriptedServer, api: Make, retries: int
) -> None:
    """A connection that breaks with its server costs no row an attempt, even the last one."""
    server.script = lambda _: asyncio.sleep(0.05)
    xs = [str(i) for i in range(60)]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(max_in_flight=8, retries=retries).predict_batches, xs)
        for seen in (10, 30):
            server.wait_until(lambda seen=seen: len(server.posts) >= seen)  # type: ignore[misc]
            server.stop()
            time.sleep(0.3)
            server.start()
        assert call.result(timeout=60) == [answer_to(x) for x in xs]


@pytest.mark.parametrize("health", [200, 404])
@pytest.mark.parametrize("retries", [0, 1])
def test_500_of_a_gateway_whose_server_is_away_is_waited_out(
    server: ScriptedServer, api: Make, health: int, retries: int
) -> None:
    """While nothing succeeds no row is blamed, whatever the gateway reports, and few requests are sent."""
    begins, lasts = 40, 0.6

    async def script(asked: Asked) -> Deed:
        if asked.body is None:
            return Reply(status=health)
        await asyncio.sleep(0.01)
        since = server.posts[begins].at if len(server.posts) > begins else asked.at
        return refused(500, "upstream is away") if 0 < asked.at - since < lasts else None

    server.script = script
    xs = [str(i) for i in range(100)]
    model = api(max_in_flight=8, retries=retries)
    assert model.predict_batches(xs) == [answer_to(x) for x in xs]
    assert len(server.posts) < 100 + 8 * (retries + 1) + 40


def test_500_for_ever_ends_the_call_after_the_patience(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server counts as unavailable, with its message, and no row is called failed."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.3")
    server.script = lambda asked: (
        refused(500, "upstream is away") if asked.body and len(server.posts) > 40 else None
    )
    with pytest.raises(ServerUnavailable, match=r"for 0.3 s .*upstream is away") as raised:
        api(max_in_flight=8).predict_batches([str(i) for i in range(100)])
    assert not any(isinstance(result, RowError) for result in raised.value.results or ())


def test_rows_that_always_fail_are_told_from_an_outage_at_the_end_too(
    server: ScriptedServer, api: Make
) -> None:
    """If only such rows are left, a request that succeeded before is sent again as a proof."""
    server.script = lambda asked: refused(500, "no") if asked.prompt.startswith("z") else None
    xs = [*"abc", *(f"z{i}" for i in range(12))]
    results = api(max_in_flight=4).predict_batches(xs, on_error="return")
    assert results[:3] == [answer_to(x) for x in "abc"]
    assert all(isinstance(result, RowError) and result.kind == "server" for result in results[3:])
    assert [a.prompt for a in server.posts if a.prompt.startswith("z")].count("z3") == 2


def test_a_server_that_refuses_now_what_it_had_answered_is_there(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a shorter context after its return is not away only because the proof is too long."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    model = api(max_in_flight=1, retries=0)
    model.predict("x")
    server.script = lambda asked: refused(500, "away") if asked.body else None
    with pytest.raises(ServerUnavailable):
        model.predict("y")
    server.script = by_prompt(x=refused(400, "maximum model length"))
    assert model.predict("y") == answer_to("y")


def test_what_a_server_serves_is_told_without_a_proof(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full server with failed rows still reports its model, and rows wait for their slots."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.3)
    model = api(model=None)
    model.predict("x")
    server.script = lambda asked: refused(500, "away") if asked.body else None
    with pytest.raises(ServerUnavailable):
        model.predict_batches(["x", "y"])
    time.sleep(0.4)  # then no search looks whether it is well
    server.script = once(*[refused(429, "full")] * 3)
    assert engine_loop.run(sharing.facts(model.engine_config()))["model"] == MODEL
    assert model.predict("y") == answer_to("y")


def test_servers_that_hang_do_not_hold_up_the_search(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health of all is checked at once, so the healthy one is found among any number that hang."""
    monkeypatch.setattr(control, "CONTROL_TIMEOUT", 1.0)
    monkeypatch.setattr(servers, "LEFT_ALONE", 60.0)

    async def script(asked: Asked) -> Deed:
        return Reply() if asked.path.startswith("/well") else await hang(asked)

    server.script = script
    model = api([*(f"{server.url}/{i}" for i in range(40)), f"{server.url}/well"])

    async def find(servers: Servers) -> None:
        await lose_all(servers)
        assert str((await servers.take_slot()).endpoint) == f"{server.url}/well"

    on_servers(model, find)


def test_a_health_check_that_leads_nowhere_is_no_failure(server: ScriptedServer, api: Make) -> None:
    """A redirect to an invalid URL counts as a response, and rows that wait for the server resume."""
    elsewhere = Reply(status=302, headers={"Location": "http://[bad"})
    server.script = lambda asked: elsewhere if asked.path == "/health" else None

    async def find(servers: Servers) -> None:
        await lose_all(servers)
        await servers.take_slot()

    on_servers(api(), find)


# ---------------------------------------------------------------------- behind a gateway


def away_until(health_checks: int, status: int = 503) -> Callable[[Asked], Deed]:
    """A gateway whose server is away until its health was checked so many times."""
    left = [health_checks]

    def script(asked: Asked) -> Deed:
        if left[0] <= 0:
            return None
        left[0] -= asked.path == "/health"
        return Reply(b"<html>Service Temporarily Unavailable</html>", status)

    return script


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_restarted_behind_a_gateway_answers_all(
    server: ScriptedServer, api: Make, status: int
) -> None:
    """A gateway's error in the server's place costs no row an attempt, and begins the grace period."""
    server.script = away_until(6, status)
    xs = [str(i) for i in range(60)]
    assert api(max_in_flight=20, retries=0).predict_batches(xs) == [answer_to(x) for x in xs]
    assert [a.path for a in server.requests].count("/health") == 7
    assert len(server.posts) <= 20 + 60


@pytest.mark.parametrize("model", [None, "m"])
def test_a_slow_health_check_holds_up_its_row_only(
    server: ScriptedServer, api: Make, model: str | None
) -> None:
    """A gateway with occasional failures and slow health checks completes the other rows."""
    failed = set()
    meanwhile: list[int] = []

    async def script(asked: Asked) -> Deed:
        if asked.path == "/health":
            before = len(server.posts)
            await asyncio.sleep(1)
            meanwhile.append(len(server.posts) - before)
        if asked.body and asked.prompt.endswith("00") and asked.prompt not in failed:
            failed.add(asked.prompt)
            return refused(502, "bad gateway")
        await asyncio.sleep(0.01)
        return None

    server.script = script
    xs = [str(i) for i in range(1, 400)]
    assert api(model=model, max_in_flight=8).predict_batches(xs) == [answer_to(x) for x in xs]
    assert min(meanwhile) > 8


def test_a_health_check_that_hangs_ends_no_call_whose_rows_are_answered(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that completes meanwhile lets the next one start, whatever becomes of the search."""
    monkeypatch.setattr(control, "CONTROL_TIMEOUT", 0.3)
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.1)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "1")
    failed = set()

    async def script(asked: Asked) -> Deed:
        if asked.body is None:
            return await hang(asked)
        if asked.prompt == "0" and asked.prompt not in failed:
            failed.add(asked.prompt)
            return refused(502, "bad gateway")
        await asyncio.sleep(0.8)
        return None

    server.script = script
    xs = [str(i) for i in range(12)]
    assert api(max_in_flight=4).predict_batches(xs) == [answer_to(x) for x in xs]


def test_a_gateway_without_a_server_ends_the_call_after_the_patience(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not come back is unavailable, whatever answers in its place."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.3")
    server.script = away_until(9999)
    with pytest.raises(ServerUnavailable, match=rf"{server.url} for 0.3 s .*HTTP 503 from .*/health"):
        api().predict_batches([str(i) for i in range(20)])


def test_a_gateway_without_a_server_is_left_alone(
    server: ScriptedServer, other: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server takes over at no cost to the rows."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 60.0)
    server.script = away_until(9999)
    xs = [str(i) for i in range(30)]
    model = api([server.url, other.url], max_in_flight=3, retries=0)
    assert model.predict_batches(xs) == [answer_to(x) for x in xs]
    assert len(server.posts) <= 3
    assert [a.path for a in server.requests].count("/health") == 1


def test_a_healthy_server_that_takes_no_row_ends_the_call_after_the_patience(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 503 of a healthy server fails no row, and one health check at a time serves all rows."""
    monkeypatch.setattr(servers, "PROBE_EVERY", 60.0)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.3")
    server.script = lambda asked: None if asked.body is None else refused(503, "overloaded")
    with pytest.raises(ServerUnavailable, match=r"for 0.3 s .*HTTP 503 .*overloaded"):
        api().predict_batches([str(i) for i in range(40)])
    assert 40 < len(server.posts) < 80
    assert [a.path for a in server.requests].count("/health") == 1


def test_a_server_that_says_when_to_come_back_is_not_in_doubt(server: ScriptedServer, api: Make) -> None:
    """A server that sends 503 with Retry-After is not away."""
    server.script = once(refused(503, "busy", Retry_After="0"))
    assert api().predict("x") == answer_to("x")
    assert len(server.requests) == 2
