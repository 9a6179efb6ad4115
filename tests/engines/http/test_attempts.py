"""Over HTTP: rows that are sent again, calls that end, and poison among rows."""

from __future__ import annotations

import asyncio
import email.utils
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.engines.http.deeds import Make, ended, lose_all, on_servers, once, only_error
from tests.servers.scripted_server import (
    Asked,
    Deed,
    Raw,
    ScriptedServer,
    answer_to,
    hang,
    hang_rows,
    refused,
)
from vllm_tasks.engines.http import attempts, servers
from vllm_tasks.engines.http.servers import Servers
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Completion

pytestmark = pytest.mark.usefixtures("hasty")


# ---------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "deed",
    [
        refused(500, "oops"),
        ended("abort"),
        ended("error"),
        refused(503, "oops"),
        refused(408, "oops"),
        refused(409, "oops"),
        refused(425, "oops"),
        refused(429, "oops"),
        Raw(reset=True),
        Raw(),
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
        Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{"),
    ],
)
def test_a_passing_failure_is_retried(server: ScriptedServer, api: Make, deed: Deed) -> None:
    """5xx, 408, 409, 425, 429, a broken connection and an answer that vLLM gave up are retried silently."""
    server.script = once(deed)
    assert api().predict("x") == answer_to("x")
    assert len(server.posts) == 2


def test_seconds_are_those_of_the_attempt_that_succeeded(server: ScriptedServer, api: Make) -> None:
    """Failed attempts, the time between attempts, and the time in the queue do not count."""
    refusals = [refused(429, "slow down", Retry_After="3")]

    async def script(asked: Asked) -> Deed:
        if asked.body is None:
            return None
        await asyncio.sleep(0.3)
        return refusals.pop() if refusals else None

    server.script = script
    for completion in api(max_in_flight=1).completions(["x", "y", "z"]):
        assert isinstance(completion, Completion)
        assert completion.seconds is not None
        assert 0.3 <= completion.seconds < 3


def test_retries_end_in_an_error_of_the_row(server: ScriptedServer, api: Make) -> None:
    """A server that keeps failing gets 1 + retries requests, and its message is in the error."""
    server.script = lambda _: refused(500, "CUDA error: device-side assert")
    error = only_error(api(retries=2))
    assert (error.kind, error.retryable, error.index) == ("server", True, 0)
    assert "CUDA error: device-side assert" in error.message
    assert "3 attempts" in error.message
    assert len(server.posts) == 3


@pytest.mark.parametrize(
    ("header", "at_least"),
    [
        (lambda: "1", 0.9),
        (lambda: email.utils.formatdate(time.time() + 2, usegmt=True), 0.9),
    ],
)
def test_retry_after_is_obeyed(
    server: ScriptedServer, api: Make, header: Callable[[], str], at_least: float
) -> None:
    """A server that gives a time, in seconds or as a date, gets no request before it."""
    server.script = lambda _: (
        refused(429, "slow down", Retry_After=header()) if len(server.posts) == 1 else None
    )
    assert api().predict("x") == answer_to("x")
    first, second = server.posts
    assert second.at - first.at >= at_least


@given(st.text() | st.floats().map(str) | st.integers().map(str))
@example("Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
@example("Mon, 01 Jan 2024 00:00:00 +99999999999999")
@example("nan")
def test_any_retry_after_is_a_bounded_time_or_none(value: str) -> None:
    """For any header, the wait is between 0 and the limit, or our own backoff."""
    seconds = attempts.retry_after(value)
    assert seconds is None or 0 <= seconds <= attempts.RETRY_AFTER_LIMIT


@given(st.integers(0, 10_000))
def test_backoff_is_bounded(failures: int) -> None:
    """The wait grows with the failures up to the limit, for any number of them."""
    assert 0 <= attempts.backoff(failures) <= attempts.BACKOFF_LIMIT


def test_a_timed_out_attempt_is_repeated_once(server: ScriptedServer, api: Make) -> None:
    """A row that takes longer than `timeout` twice is an error of kind timeout, for any `retries`."""
    server.script = hang_rows
    error = only_error(api(timeout=0.3, retries=5))
    assert (error.kind, error.retryable) == ("timeout", True)
    assert "timeout=0.3 s" in error.message
    assert len(server.posts) == 2
    server.wait_until(lambda: server.dropped == 2)


def test_a_dripping_answer_times_out(server: ScriptedServer, api: Make) -> None:
    """The timeout is for the complete attempt: a byte now and then does not prolong it."""
    server.script = lambda _: Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 500, pause=0.05)
    assert only_error(api(timeout=0.5)).kind == "timeout"


# ---------------------------------------------------------------------- the end of a call


def test_an_interrupted_call_cancels_its_requests_and_leaves_the_model_usable(
    server: ScriptedServer, api: Make
) -> None:
    """Ctrl-C drops the open requests, so that vLLM stops generating, and frees the window."""
    server.script = hang_rows
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        server.wait_until(lambda: server.open == 4)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    model = api(max_in_flight=4)
    with pytest.raises(KeyboardInterrupt):
        model.predict_batches([str(i) for i in range(20)])
    server.wait_until(lambda: server.open == 0)
    assert (server.dropped, len(server.posts)) == (4, 4)
    server.script = lambda _: None
    assert len(model.predict_batches([str(i) for i in range(20)])) == 20


def test_a_call_interrupted_while_it_looks_for_a_server_stops_looking(
    server: ScriptedServer, api: Make
) -> None:
    """The search for a server stops when nobody waits for it."""
    server.script = lambda _: refused(503, "dead")
    main = threading.main_thread().ident
    assert main is not None

    def health_checks() -> int:
        return sum(a.path == "/health" for a in server.requests)

    def interrupt() -> None:
        server.wait_until(health_checks)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        api(model=None).predict("x")
    time.sleep(0.3)
    seen = health_checks()
    time.sleep(0.5)
    assert health_checks() == seen


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_a_row_after_one_that_was_cancelled_in_the_queue_has_its_turn(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """This holds for a cancellation at the same moment, and when nobody searches for the server any more."""
    monkeypatch.setattr(servers, "LEFT_ALONE", 0.1)

    async def cancel(servers: Servers) -> None:
        await lose_all(servers)
        waiting = asyncio.create_task(servers.take_slot())
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.sleep(seconds)
        server.start()
        await servers.take_slot()

    server.stop()
    on_servers(api(), cancel)


def test_a_row_does_not_wait_for_a_question_that_was_cancelled(server: ScriptedServer, api: Make) -> None:
    """If another row's check of the model is cancelled, the waiting row does the check itself."""

    async def script(asked: Asked) -> Deed:
        return await hang(asked) if asked.path == "/v1/models" else None

    server.script = script

    async def cancel(servers: Servers) -> None:
        asks = asyncio.create_task(servers.facts())
        await asyncio.sleep(0.3)
        row = asyncio.create_task(servers.take_slot())
        await asyncio.sleep(0.1)
        asks.cancel()
        await row

    on_servers(api(model=None), cancel)


def test_an_interrupted_process_ends_and_cancels_its_requests(server: ScriptedServer) -> None:
    """SIGINT to a script in the middle of a call drops its requests and ends it with KeyboardInterrupt."""
    server.script = hang_rows
    script = (
        "from vllm_tasks import VllmAPI\n"
        f"VllmAPI(identifier='a', model='m', api_url={server.url!r}).predict_batches(['a', 'b', 'c'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    server.wait_until(lambda: server.open == 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors
    assert "Unclosed" not in errors
    server.wait_until(lambda: server.dropped == 3)


def test_a_closed_model_leaves_no_connection(server: ScriptedServer, api: Make) -> None:
    """`close()` closes the pooled connections, and the next call opens new ones."""
    model = api()
    model.predict("x")
    assert server.connections == 1
    model.close()
    server.wait_until(lambda: server.connections == 0)
    assert model.predict("x") == answer_to("x")


# ---------------------------------------------------------------------- all at once


@pytest.mark.parametrize("temperature", [0, 1])
def test_poisoned_rows_fail_alone(server: ScriptedServer, api: Make, temperature: int) -> None:
    """Of 1,000 rows with 10 poisoned ones, 990 complete in order and 10 errors name their row and reason."""
    long = "x" * 10_000_000
    poison = [
        (None, "prompt", "None"),
        (object(), "prompt", "object"),
        ("\ud800", "prompt", "Unicode"),
        (long, "too_long", "maximum context length"),
        ("forbidden", "refused", "we do not speak of this"),
    ] * 2
    rows: list[Any] = [f"row {i}" for i in range(1000)]
    bad = {97 * (k + 1): case for k, case in enumerate(poison)}
    for i, (x, _, _) in bad.items():
        rows[i] = x

    def script(asked: Asked) -> Deed:
        if len(asked.prompt) > 100_000:
            return refused(400, "This model's maximum context length is 1024 tokens.")
        return refused(400, "we do not speak of this") if asked.prompt == "forbidden" else None

    server.script = script
    with pytest.raises(RowErrors) as raised:
        api().predict_batches(rows, temperature=temperature)
    results = raised.value.results
    assert [r for i, r in enumerate(results) if i not in bad] == [
        answer_to(x) for i, x in enumerate(rows) if i not in bad
    ]
    assert [(e.index, e.kind) for e in raised.value.errors] == [(i, kind) for i, (_, kind, _) in bad.items()]
    assert all(bad[e.index][2] in e.message for e in raised.value.errors)
    assert raised.value.errors == [results[i] for i in bad]
    assert len(server.posts) == 990 + (2 if temperature == 0 else 4)
