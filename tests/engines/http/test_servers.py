"""Over HTTP: the order of rows, the window, and which of several servers gets a row."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engines.http.deeds import Make, serves
from tests.servers.scripted_server import MODEL, Asked, Deed, ScriptedServer, answer_to
from vllm_tasks import InvalidCall
from vllm_tasks.engines import loop as engine_loop
from vllm_tasks.engines.http import servers

pytestmark = pytest.mark.usefixtures("hasty")


# ---------------------------------------------------------------------- order and window


def test_answers_keep_the_order_of_the_rows(server: ScriptedServer, api: Make) -> None:
    """Rows whose answers come in another order are returned in their own."""

    async def later_rows_first(asked: Asked) -> None:
        await asyncio.sleep(0.002 * (40 - int(asked.prompt)))

    server.script = later_rows_first
    xs = [str(i) for i in range(40)]
    assert api().predict_batches(xs) == [answer_to(x) for x in xs]


@pytest.mark.parametrize("max_batch_size", [1, 4, None])
def test_never_more_in_flight_than_the_limit_and_the_limit_is_used(
    server: ScriptedServer, api: Make, max_batch_size: int | None
) -> None:
    """The server sees exactly `max_in_flight` rows at once if there are enough, for any chunk size."""
    server.script = lambda asked: asyncio.sleep(0.02)
    xs = [str(i) for i in range(60)]
    api(max_in_flight=6, max_batch_size=max_batch_size).predict_batches(xs)
    assert (server.peak, len(server.posts)) == (6, 60)


def test_the_limit_holds_over_all_calls_of_the_process(server: ScriptedServer, api: Make) -> None:
    """Two concurrent calls from two threads, of two models of the same server, share one window."""
    server.script = lambda asked: asyncio.sleep(0.02)
    with ThreadPoolExecutor(2) as threads:
        calls = [
            threads.submit(api(max_in_flight=5).predict_batches, [f"{c}{i}" for i in range(30)]) for c in "ab"
        ]
        results = [call.result() for call in calls]
    assert results == [[answer_to(f"{c}{i}") for i in range(30)] for c in "ab"]
    assert server.peak == 5


def test_a_large_chunk_does_not_become_as_many_tasks(server: ScriptedServer, api: Make) -> None:
    """With max_batch_size=None, only a window's worth of 2,000 rows are tasks at once."""
    tasks: list[int] = []

    def script(asked: Asked) -> Deed:
        tasks.append(len(asyncio.all_tasks(engine_loop.engine_loop())))
        return None

    server.script = script
    assert len(api(max_in_flight=8, max_batch_size=None).predict_batches(["x"] * 2000)) == 2000
    assert max(tasks) < 40


def test_a_slow_row_holds_up_no_other(server: ScriptedServer, api: Make) -> None:
    """The window never drains: a row that waits for all others to be sent does not wait forever."""

    async def first_answers_last(asked: Asked) -> None:
        if asked.prompt == "0":
            await asyncio.to_thread(server.wait_until, lambda: len(server.posts) == 50)

    server.script = first_answers_last
    xs = [str(i) for i in range(50)]
    assert api(max_in_flight=4, max_batch_size=4).predict_batches(xs) == [answer_to(x) for x in xs]


def test_a_call_of_one_chunk_does_not_hold_up_another_call(server: ScriptedServer, api: Make) -> None:
    """With max_batch_size=None, 300 rows of a window of 4 leave slots for a row of another thread."""
    server.script = lambda asked: asyncio.sleep(0.005)
    model = api(max_in_flight=4, max_batch_size=None)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(model.predict_batches, [str(i) for i in range(300)])
        server.wait_until(lambda: server.posts)
        assert model.predict("x") == answer_to("x")
        assert len(call.result()) == 300


def test_identical_rows_are_asked_once_where_their_answers_must_be_equal(
    server: ScriptedServer, api: Make
) -> None:
    """At temperature 0 equal rows cost one request; otherwise each row is a sample of its own."""
    model = api()
    assert model.predict_batches(["x", "y", "x"], temperature=0) == [answer_to(t) for t in "xyx"]
    assert sorted(a.prompt for a in server.posts) == ["x", "y"]
    model.predict_batches(["x", "x"], temperature=0.7)
    model.predict_batches(["x", "x"])
    assert len(server.posts) == 6


# ---------------------------------------------------------------------- several servers


def test_the_least_loaded_server_gets_the_next_row(
    server: ScriptedServer, other: ScriptedServer, api: Make
) -> None:
    """A server that is slow holds its share and no more; the quick one takes the rest."""

    async def when_the_other_did_20(_: Asked) -> None:
        await asyncio.to_thread(server.wait_until, lambda: len(other.posts) >= 20, seconds=5)

    server.script = when_the_other_did_20
    xs = [str(i) for i in range(24)]
    model = api([server.url, other.url], max_in_flight=2, retries=0)
    assert model.predict_batches(xs) == [answer_to(x) for x in xs]
    assert len(server.posts) <= 4
    assert server.peak == 2 >= other.peak


@pytest.mark.parametrize(
    ("ours", "theirs", "model", "told"),
    [
        (serves("big"), serves("small"), None, "'big'.*'small'"),
        (serves("big"), serves("small"), "big", "'big'.*'small'"),
        (serves("llm", root="/big"), serves("llm", root="/small"), None, "/big.*/small"),
    ],
)
def test_servers_of_different_models_are_refused_before_the_first_row(
    server: ScriptedServer, other: ScriptedServer, api: Make, ours: Any, theirs: Any, model: Any, told: str
) -> None:
    """Two models never process rows of one call; the error names both and their URLs."""
    server.script, other.script = ours, theirs
    with pytest.raises(InvalidCall, match=told) as raised:
        api([server.url, other.url], model=model).predict_batches([str(i) for i in range(8)])
    assert server.url in str(raised.value)
    assert other.url in str(raised.value)
    assert server.posts == other.posts == []


@pytest.mark.parametrize("model", [None, "llm", "an alias that no server lists"])
def test_servers_of_the_same_model_share_the_rows(
    server: ScriptedServer, other: ScriptedServer, api: Make, model: Any
) -> None:
    """Servers that list the same model count as one, whether or not they list the requested name."""
    server.script = serves("llm", root="/a", then=lambda _: None)
    other.script = serves("llm")
    xs = [str(i) for i in range(20)]
    assert api([server.url, other.url], model=model).predict_batches(xs) == [answer_to(x) for x in xs]
    assert server.posts
    assert other.posts


def test_the_order_of_urls_is_not_in_the_fingerprint(
    server: ScriptedServer, other: ScriptedServer, api: Make
) -> None:
    """A table is up to date in any order of its servers."""
    orders = [server.url, other.url], [other.url, server.url]
    calls = [(made := api(urls, model=None)).prepare(made.predict_in_db).over("text") for urls in orders]
    assert calls[0].fingerprint == calls[1].fingerprint
    assert calls[0].model_name == MODEL


@pytest.mark.parametrize("urls", [1, 2])
def test_a_server_that_comes_back_with_another_model_ends_the_call(
    server: ScriptedServer, other: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, urls: int
) -> None:
    """After an outage the server must list the same model again; the next call may accept another one."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.05)
    server.script = other.script = serves("old", then=lambda _: asyncio.sleep(0.02))  # type: ignore[arg-type, return-value]
    model = api([server.url, other.url][:urls], model=None, max_in_flight=2)
    model.predict("x")
    server.stop()
    server.script = serves("new")
    comes = threading.Timer(0.3, server.start)
    comes.start()
    with pytest.raises(InvalidCall, match=r"'old'.*'new'|'new'.*'old'"):
        model.predict_batches([str(i) for i in range(200)])
    comes.join()
    assert {asked.body["model"] for asked in server.posts} == {"old"}
    other.script = serves("new")
    assert model.predict("x") == answer_to("x")


def test_rows_that_get_no_connection_in_their_time_are_not_late(server: ScriptedServer, api: Make) -> None:
    """A machine that swallows all packets is a lost server for any `timeout`, and others take over."""
    with socket.socket() as hole, socket.socket() as a, socket.socket() as b:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for filler in (a, b):  # from then on no connection is accepted, nor refused
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        server.script = lambda _: asyncio.sleep(0.05)
        xs = [str(i) for i in range(60)]
        model = api([f"http://127.0.0.1:{hole.getsockname()[1]}", server.url], timeout=1, max_in_flight=4)
        assert model.predict_batches(xs) == [answer_to(x) for x in xs]


@pytest.mark.parametrize(("retries", "name"), [(0, "m"), (1, "m"), (0, None)])
def test_servers_that_are_down_are_left_alone(
    server: ScriptedServer,
    other: ScriptedServer,
    api: Make,
    monkeypatch: pytest.MonkeyPatch,
    retries: int,
    name: str | None,
) -> None:
    """Others take over at no cost to the rows, within their own limit; the lost one gets no rows."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 60.0)
    other.script = lambda asked: asyncio.sleep(0.01)
    server.stop()
    with ScriptedServer() as third:
        third.stop()
        urls = [server.url, third.url, other.url]
        model = api(urls, model=name, max_in_flight=3, retries=retries)
        xs = [str(i) for i in range(30)]
        assert model.predict_batches(xs) == [answer_to(x) for x in xs]
        assert other.peak == 3
        server.start()
        third.start()
        assert model.predict_batches(xs) == [answer_to(x) for x in xs]
        assert (server.posts, third.posts) == ([], [])


def test_rows_that_take_longer_than_the_patience_are_no_silence(
    server: ScriptedServer, other: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one server works, rows that find the other one away wait, any number of times."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.2")
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.05)
    other.script = lambda _: asyncio.sleep(1)
    server.stop()
    xs = [str(i) for i in range(6)]
    model = api([server.url, other.url], max_in_flight=2, retries=0)
    assert model.predict_batches(xs) == [answer_to(x) for x in xs]


def test_a_server_that_was_down_gets_rows_again(
    server: ScriptedServer, other: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its pause a server that is back gets its share of the rows."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.05)
    server.stop()
    model = api([server.url, other.url])
    model.predict("x")
    assert len(other.posts) == 1
    server.start()
    time.sleep(0.2)
    model.predict_batches([str(i) for i in range(20)])
    assert server.posts
