"""Rows over HTTP, as a caller of `VllmAPI` sees them, against a real server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
from vllm_tasks import InvalidCall, RowError, VllmAPI
from vllm_tasks.engines import loop as engine_loop
from vllm_tasks.engines import sharing
from vllm_tasks.engines.http import attempts, capacity, control, servers
from vllm_tasks.engines.http.engine import HttpEngine, words_of
from vllm_tasks.engines.http.servers import Servers
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.errors import RowErrors, ServerUnavailable
from vllm_tasks.results import Completion

KEY = "sk-secret-0123456789"
Make = Callable[..., VllmAPI]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; the order of events stays the same."""
    monkeypatch.setattr(attempts, "BACKOFF_BASE", 0.02)
    monkeypatch.setattr(capacity, "HOLD", 0.1)
    monkeypatch.setattr(servers, "PROBE_EVERY", 0.05)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "20")


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def api(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a `VllmAPI` of the server, with one retry, and closes it after the test."""
    made: list[VllmAPI] = []

    def make(api_url: str | list[str] = "", **fields: Any) -> VllmAPI:
        fields = {"model": "m", "retries": 1, "timeout": 60, **fields}
        made.append(VllmAPI(identifier="a", api_url=api_url or server.url + "/v1/completions", **fields))
        return made[-1]

    yield make
    for model in made:
        model.close()


def ended(reason: str) -> Reply:
    """An answer that vLLM has given up, as it is by a shutdown, a pause or an error of its own."""
    return Reply({"choices": [{"index": 0, "text": "", "finish_reason": reason}], "usage": {}})


def once(*deeds: Deed) -> Callable[[Asked], Deed]:
    """A script that does these for the first requests, and the usual for all later ones."""
    left = list(deeds)

    def script(asked: Asked) -> Deed:
        return left.pop(0) if left and asked.body is not None else None

    return script


def by_prompt(**deeds: Deed) -> Callable[[Asked], Deed]:
    """A script that treats some prompts in their own way."""
    return lambda asked: deeds.get(asked.prompt) if asked.body is not None else None


def only_error(model: VllmAPI, x: Any = "x", **sampling: Any) -> RowError:
    """The error of a call with one row, which must fail."""
    (error,) = model.predict_batches([x], on_error="return", **sampling)
    assert isinstance(error, RowError)
    return error


def on_servers(model: VllmAPI, work: Callable[[Servers], Awaitable[object]]) -> None:
    """Do `work` with the servers of an engine of its own; it may not take long."""

    async def do() -> None:
        engine = HttpEngine(model.engine_config())
        await engine.start()
        try:
            await asyncio.wait_for(work(engine._servers), 10)
        finally:
            await engine.close()

    engine_loop.run(do())


async def lose_all(servers: Servers) -> None:
    """Mark all servers as lost, as if a row had found each of them away."""
    for server in servers.all:
        servers.lose(server, "away")


# ---------------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    ("url", "base", "protocol"),
    [
        ("http://generate", "http://generate", "openai"),
        ("http://v1/", "http://v1", "openai"),
        ("http://v1/v1/completions", "http://v1", "completions"),
        ("http://generate/api/generate", "http://generate/api", "legacy"),
    ],
)
def test_a_host_with_the_name_of_a_path_is_a_host(url: str, base: str, protocol: str) -> None:
    """Only the path of a URL selects the protocol."""
    (endpoint,), found = split_urls(url)
    assert (str(endpoint), found) == (base, protocol)


@pytest.mark.parametrize("host", ["my..host", "a" * 64 + ".com"])
def test_a_host_that_cannot_be_looked_up_is_the_calls_fault(host: str) -> None:
    """Such a name is no server that may come back."""
    with pytest.raises(InvalidCall, match=f"{host}.*label empty or too long"):
        split_urls(f"http://{host}:8000")


def test_legacy_posts_prompt_and_sampling_and_cuts_the_prompt_off(server: ScriptedServer) -> None:
    """The former api_server gets exactly prompt and sampling, and its text loses the prompt."""
    model = VllmAPI(identifier="a", api_url=f"http://127.0.0.1:{server.port}/generate")
    assert model.predict("1+1=") == answer_to("1+1=")
    assert model.predict("1+1=", n=3, temperature=0.5) == [answer_to("1+1=")] * 3
    model.close()
    assert [(a.path, a.body) for a in server.requests] == [
        ("/generate", {"prompt": "1+1="}),
        ("/generate", {"prompt": "1+1=", "n": 3, "temperature": 0.5}),
    ]


@pytest.mark.parametrize(
    ("suffix", "chat", "path"),
    [
        ("/v1/completions", False, "/v1/completions"),
        ("/v1/chat/completions", False, "/v1/chat/completions"),
        ("", False, "/v1/completions"),
        ("", True, "/v1/chat/completions"),
        ("/v1", False, "/v1/completions"),
        ("/v1/", True, "/v1/chat/completions"),
    ],
)
def test_the_url_and_the_prompt_pick_the_path(
    server: ScriptedServer, api: Make, suffix: str, chat: bool, path: str
) -> None:
    """A full path is taken as it is; a base URL serves texts and chat messages as they come."""
    assert api(server.url + suffix, chat=chat).predict("x", max_tokens=7) == answer_to("x")
    (asked,) = server.requests
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    assert (asked.path, asked.body) == (path, {"model": "m", **prompt, "max_tokens": 7})


def test_completions_carry_usage_finish_reason_and_model(api: Make) -> None:
    """`completions` returns everything that the protocol reports beside the text."""
    (completion,) = api().completions(["x"], n=2)
    assert not isinstance(completion, RowError)
    assert [c.text for c in completion.choices] == [answer_to("x")] * 2
    assert [c.finish_reason for c in completion.choices] == ["stop"] * 2
    assert (completion.prompt_tokens, completion.completion_tokens, completion.model) == (3, 5, "m")


def test_the_model_is_asked_of_the_server_once(server: ScriptedServer, api: Make) -> None:
    """Without a model name the first one that the server lists is used, requested once for all rows."""
    model = api(model=None)
    model.predict_batches([str(i) for i in range(20)])
    model.predict("x")
    assert [a.path for a in server.requests].count("/v1/models") == 1
    assert {a.body["model"] for a in server.posts} == {MODEL}


def test_a_server_with_another_model_than_before_is_asked_anew(server: ScriptedServer, api: Make) -> None:
    """A model name from the server is forgotten when the server does not know it any more."""
    names = ["old"]

    def script(asked: Asked) -> Deed:
        if asked.path == "/v1/models":
            return Reply({"data": [{"id": names[-1]}]})
        return None if asked.body["model"] == names[-1] else refused(404, "no such model")

    server.script = script
    model = api(model=None)
    model.predict("x")
    names.append("new")
    with pytest.raises(InvalidCall, match="no such model"):
        model.predict("x")
    assert model.predict("x") == answer_to("x")


def serves(*names: str, root: str | None = None, then: Callable[[Asked], Deed] | None = None) -> Any:
    """A script of a server that lists these models, the second one on as adapters of the first."""
    entries = [{"id": name, "root": root, "parent": names[0] if i else None} for i, name in enumerate(names)]

    def script(asked: Asked) -> Deed:
        if asked.path == "/v1/models":
            return Reply({"data": entries})
        return then(asked) if then else None

    return script


def test_of_several_models_one_must_be_named(server: ScriptedServer, api: Make) -> None:
    """A server that lists a model and its adapter is refused unless `model` names one."""
    server.script = serves("base", "adapter")
    with pytest.raises(InvalidCall, match=r"'base', 'adapter'.*model="):
        api(model=None).predict("x")
    assert server.posts == []
    assert api(model="adapter").predict("x") == answer_to("x")
    assert server.posts[0].body["model"] == "adapter"


@pytest.mark.parametrize("deed", [Reply({"data": []}), Reply(b"<html>"), Reply({"data": [{"id": 5}]})])
def test_a_server_that_does_not_tell_its_model_is_the_calls_fault(
    server: ScriptedServer, api: Make, deed: Deed
) -> None:
    """An unusable list of models raises InvalidCall, which says to pass `model`."""
    server.script = lambda asked: deed if asked.path == "/v1/models" else None
    with pytest.raises(InvalidCall, match="pass model="):
        api(model=None).predict("x")
    assert server.posts == []


@pytest.mark.parametrize(
    "deed",
    [
        refused(503, "loading"),
        refused(429, "slow down"),
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
        Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{"),
        Raw(reset=True),
        Raw(b"no HTTP at all\r\n\r\n"),
    ],
)
def test_a_list_of_models_that_fails_once_is_asked_again(
    server: ScriptedServer, api: Make, deed: Deed
) -> None:
    """A control call that breaks or is put off is repeated, and no row fails for it."""
    deeds = [deed]
    server.script = lambda asked: deeds.pop() if asked.path == "/v1/models" and deeds else None
    assert api(model=None, retries=3).predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]


@pytest.mark.parametrize("deed", [None, Raw(b"HTTP/1.1 200 OK\r\n" + b"X" * 200, pause=0.01)])
def test_a_list_of_models_that_never_comes_is_no_server(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, deed: Deed
) -> None:
    """A control call that hangs or drips is given up, and not once for each row."""
    monkeypatch.setattr(control, "CONTROL_TIMEOUT", 0.3)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.2")

    async def stuck(asked: Asked) -> Deed:
        return deed or await hang(asked) if asked.path == "/v1/models" else None

    server.script = stuck
    with pytest.raises(ServerUnavailable, match=r"(within 0\.3 s|timed out).*pass model='\.\.\.'"):
        api(model=None).predict_batches([str(i) for i in range(100)])
    assert [a.path for a in server.requests].count("/v1/models") <= 4


@pytest.mark.parametrize(
    ("model", "cut", "told"),
    [
        (None, {"/version"}, {"model": MODEL, "root": "/models/scripted"}),
        ("m", {"/version", "/v1/models"}, {"model": "m"}),
    ],
)
def test_a_gateway_that_cuts_control_calls_is_still_a_server(
    server: ScriptedServer, api: Make, model: str | None, cut: set[str], told: dict[str, str]
) -> None:
    """A truncated control path ends the check, and the server does not count as lost."""
    server.script = lambda asked: Raw(reset=True) if asked.path in cut else None
    facts = sharing.facts(api(model=model).engine_config())
    assert engine_loop.run(asyncio.wait_for(facts, 20)) == told
    assert "/health" not in {asked.path for asked in server.requests}


def test_a_list_of_models_in_many_small_chunks_is_read_whole(server: ScriptedServer, api: Make) -> None:
    """A control answer may come in as many HTTP chunks as its sender likes."""
    content = json.dumps({"data": [{"id": "in-pieces"}]}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    whole = Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    server.script = lambda asked: whole if asked.path == "/v1/models" else None
    assert api(model=None).predict("x") == answer_to("x")
    assert server.posts[0].body["model"] == "in-pieces"


def test_a_list_of_models_without_end_is_not_read_to_its_end(server: ScriptedServer, api: Make) -> None:
    """More than a control answer may have is no list of models."""
    chunks = b"400\r\n" + b"x" * 1024 + b"\r\n"
    endless = Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * 2000)
    server.script = lambda asked: endless if asked.path == "/v1/models" else None
    with pytest.raises(InvalidCall, match="pass model="):
        api(model=None).predict("x")


# ---------------------------------------------------------------------- encrypted connections


@pytest.mark.parametrize("model", [None, "m"])
def test_rows_and_control_calls_trust_the_authorities_of_ssl_cert_file(
    encrypted: ScriptedServer,
    api: Make,
    monkeypatch: pytest.MonkeyPatch,
    certificate: Path,
    model: str | None,
) -> None:
    """A server with a certificate of its own works when SSL_CERT_FILE names that."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert api(encrypted.url, model=model).predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]


@pytest.mark.parametrize("model", [None, "m"])
def test_a_certificate_that_is_not_trusted_is_the_calls_fault(
    encrypted: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    """It raises at once, with the URL, the reason and the way out, and no row is sent."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(InvalidCall, match=rf"{encrypted.url}.*self.signed.*SSL_CERT_FILE"):
        api(encrypted.url, model=model).predict("x")
    assert encrypted.requests == []


@pytest.mark.parametrize("model", [None, "m"])
def test_a_server_that_speaks_no_tls_is_the_calls_fault(
    server: ScriptedServer, api: Make, model: str | None
) -> None:
    """An https URL of an http server is corrected by the caller, not waited for."""
    url = server.url.replace("http:", "https:")
    with pytest.raises(InvalidCall, match=rf"{url}.*correct api_url"):
        api(url, model=model).predict("x")


@pytest.mark.parametrize("model", [None, "m"])
def test_a_server_that_goes_away_in_the_handshake_is_waited_for(
    api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    """A connection that ends before it is encrypted does not count as a distrusted certificate."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(9999)
            except OSError:
                return

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(ServerUnavailable):
            api(f"https://127.0.0.1:{listener.getsockname()[1]}", model=model, retries=9).predict("x")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# ---------------------------------------------------------------------- the key


def test_the_key_is_sent_as_a_bearer_token_and_shown_nowhere(
    server: ScriptedServer, api: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request carries the key; no display of the model or its engine does."""
    caplog.set_level(logging.DEBUG)
    model = api(model=None, api_key=KEY)
    model.predict("x")
    assert [a.headers["Authorization"] for a in server.requests] == [f"Bearer {KEY}"] * 2
    assert KEY not in repr(model) + str(model) + repr(model.engine_config()) + caplog.text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize(
    "deed",
    [
        refused(401, f"bad key {KEY}"),
        refused(400, f"bad key {KEY}"),
        refused(500, f"bad key {KEY}"),
        Reply({"key": KEY}),
        Reply(KEY.encode()),
        Reply(status=307, headers={"Location": f"http://127.0.0.1:1/{KEY}"}),
        Raw(b"no HTTP at all\r\n\r\n"),
        Raw(f"HTTP/1.1 {KEY}\r\n\r\n".encode()),
        Raw(f"HTTP/1.1 200 OK\r\nX: {KEY}\r\nContent-Length: 9\r\n\r\n{{".encode()),
        Raw(reset=True),
    ],
)
def test_a_server_that_echoes_the_key_does_not_get_it_into_errors(
    server: ScriptedServer,
    api: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    deed: Deed,
) -> None:
    """No error and no log has the key, even if the server puts it into its response."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.1")
    server.script = lambda asked: deed if asked.path == path else None
    model = api(model=None if path == "/v1/models" else "m", api_key=KEY)
    with pytest.raises((InvalidCall, ServerUnavailable, RowErrors)) as raised:
        model.predict("x")
    seen = str(raised.value) + repr(raised.value) + caplog.text
    if isinstance(raised.value, RowErrors):
        seen += repr(raised.value.results)
    assert KEY not in seen


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("key", ["sk-base64/of/it", 'sk-"quoted"', KEY + "0123456789" * 8])
def test_a_key_is_hidden_in_every_form_that_json_has_for_it(
    server: ScriptedServer, api: Make, key: str, status: int
) -> None:
    """The key is hidden when it is escaped, and when it is truncated in the middle because it is long."""
    said = json.dumps({"error": {"message": f"bad key {key}"}, "key": key}).replace("/", r"\/")
    server.script = lambda asked: Reply(said.encode(), status) if asked.body else None
    with pytest.raises((InvalidCall, RowErrors)) as raised:
        api(api_key=key).predict("x")
    assert key[:12] not in str(raised.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f" {KEY}", f"{KEY}é", f"{KEY}\0"])
def test_a_key_that_no_header_can_carry_is_refused_before_it_is_sent(
    server: ScriptedServer, api: Make, key: str
) -> None:
    """A key with a line end, as read from a file, raises InvalidCall that names api_key and not the key."""
    with pytest.raises(InvalidCall, match="api_key") as raised:
        api(model=None, api_key=key).predict("x")
    assert KEY not in str(raised.value)
    assert server.requests == []


def test_netrc_and_proxies_of_the_environment_do_not_change_where_the_key_goes(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows and control calls go straight to the server with our key."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert api(model=None, api_key=KEY).predict("x") == answer_to("x")
    assert {a.headers["Authorization"] for a in server.requests} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(
    server: ScriptedServer, other: ScriptedServer, api: Make, path: str, status: int
) -> None:
    """A redirect is the call's fault, and the other host never hears of us or of the key."""
    moved = Reply(status=status, headers={"Location": other.url + path})
    server.script = lambda asked: moved if asked.path == path else None
    with pytest.raises(InvalidCall, match=f"HTTP {status}"):
        api(model=None, api_key=KEY).predict("x")
    assert other.requests == []


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


# ---------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "deed",
    [
        refused(500, "oops"),
        ended("abort"),
        ended("error"),
        refused(503, "oops"),
        refused(408, "oops"),
        refused(429, "oops"),
        Raw(reset=True),
        Raw(),
        Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
        Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n{"),
    ],
)
def test_a_passing_failure_is_retried(server: ScriptedServer, api: Make, deed: Deed) -> None:
    """5xx, 408, 429, a broken connection and an answer that vLLM gave up are retried silently."""
    server.script = once(deed)
    assert api().predict("x") == answer_to("x")
    assert len(server.posts) == 2


def test_seconds_are_those_of_the_attempt_that_succeeded(server: ScriptedServer, api: Make) -> None:
    """Failed attempts, the time between attempts, and the time in the queue do not count."""
    refusals = [refused(429, "slow down", Retry_After="1")]

    async def script(asked: Asked) -> Deed:
        if asked.body is None:
            return None
        await asyncio.sleep(0.3)
        return refusals.pop() if refusals else None

    server.script = script
    for completion in api(max_in_flight=1).completions(["x", "y", "z"]):
        assert isinstance(completion, Completion)
        assert completion.seconds is not None
        assert 0.3 <= completion.seconds < 0.9


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
    server.script = once(refused(429, "slow down", Retry_After=header()))
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
    server.script = hang
    error = only_error(api(timeout=0.3, retries=5))
    assert (error.kind, error.retryable) == ("timeout", True)
    assert "timeout=0.3 s" in error.message
    assert len(server.posts) == 2
    server.wait_until(lambda: server.dropped == 2)


def test_a_dripping_answer_times_out(server: ScriptedServer, api: Make) -> None:
    """The timeout is for the complete attempt: a byte now and then does not prolong it."""
    server.script = lambda _: Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 500, pause=0.05)
    assert only_error(api(timeout=0.5)).kind == "timeout"


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("temperature must be non-negative", "refused"),
        ("This model's maximum context length is 1024 tokens. However, ...", "too_long"),
        ("The decoder prompt (length 9) is longer than the maximum model length of 8. ...", "too_long"),
    ],
)
def test_a_refused_row_is_its_own_error_and_never_retried(
    server: ScriptedServer, api: Make, words: str, kind: str
) -> None:
    """A 400 fails its row with the server's message; the other rows have their answers."""
    server.script = by_prompt(b=refused(400, words))
    with pytest.raises(RowErrors) as raised:
        api().predict_batches(["a", "b", "c"])
    (error,) = raised.value.errors
    assert (error.index, error.kind, error.retryable) == (1, kind, False)
    assert words in error.message
    assert raised.value.results == [answer_to("a"), error, answer_to("c")]
    assert [a.prompt for a in server.posts].count("b") == 1


@pytest.mark.parametrize(("status", "hint"), [(401, "api_key"), (403, "api_key"), (404, "api_url and model")])
def test_what_is_wrong_with_the_call_raises_at_once(
    server: ScriptedServer, api: Make, status: int, hint: str
) -> None:
    """401, 403 and 404 end the call with the server's message, and the remaining rows are not sent."""
    server.script = lambda _: refused(status, "you shall not pass")
    with pytest.raises(InvalidCall, match=f"you shall not pass.*{hint}"):
        api(max_in_flight=4).predict_batches([str(i) for i in range(200)])
    assert len(server.posts) < 20


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize(("bad", "in_flight"), [("150", 8), ("150", 1), ("0", 8)])
def test_a_row_that_alone_is_denied_is_its_own_error(
    server: ScriptedServer, api: Make, status: int, bad: str, in_flight: int
) -> None:
    """401, 403 or 404 for one row, even the first to return, leaves the others their answers."""

    async def script(asked: Asked) -> Deed:
        if asked.body and asked.prompt == bad:
            return refused(status, "blocked by policy 77")
        await asyncio.sleep(0.005)
        return None

    server.script = script
    xs = [str(i) for i in range(200)]
    results = api(max_in_flight=in_flight).predict_batches(xs, on_error="return")
    (error,) = [result for result in results if isinstance(result, RowError)]
    assert (error.index, error.kind, error.retryable) == (int(bad), "refused", False)
    assert "blocked by policy 77" in error.message
    assert [a.prompt for a in server.posts].count(bad) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_that_is_revoked_under_way_ends_the_call(
    server: ScriptedServer, api: Make, status: int
) -> None:
    """From then on every request is denied, even a repeated one: the call fails once, not row by row."""

    async def script(asked: Asked) -> Deed:
        await asyncio.sleep(0.005)
        return refused(status, "revoked") if len(server.posts) > 50 else None

    server.script = script
    with pytest.raises(InvalidCall, match="revoked") as raised:
        api(max_in_flight=4).predict_batches([str(i) for i in range(200)])
    assert raised.value.results is not None
    assert not any(isinstance(result, RowError) for result in raised.value.results)
    assert len(server.posts) < 70


def test_a_denied_row_waits_for_none_of_another_path(server: ScriptedServer, api: Make) -> None:
    """A denied row does not wait for a slow chat on another path of the server."""

    async def script(asked: Asked) -> Deed:
        if asked.path == "/v1/completions":
            return refused(404, "no such path")
        await asyncio.sleep(3)
        return None

    server.script = script
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(api(server.url, chat=True).predict, "x")
        server.wait_until(lambda: server.open)
        with pytest.raises(InvalidCall, match="no such path"):
            api(server.url, chat=False).predict("x")
        assert not call.done()
        assert call.result() == answer_to("x")


def test_sampling_that_is_no_json_is_the_calls_fault(server: ScriptedServer, api: Make) -> None:
    """A sampling value that cannot be sent raises InvalidCall before anything is."""
    with pytest.raises(InvalidCall, match="set is not JSON serializable"):
        api().predict("x", stop={"a"})
    assert server.posts == []


@given(
    st.binary(max_size=50)
    | st.recursive(
        st.none() | st.text() | st.integers(),
        lambda inner: st.dictionaries(st.sampled_from(["error", "message", "detail"]), inner),
    ).map(lambda v: json.dumps(v).encode())
)
@example(b"[" * 100_000)
@example(b"1" * 5000)
def test_any_refusal_has_words(content: bytes) -> None:
    """Some text of any error response can be rendered."""
    words = words_of(content)
    assert len(words) <= 500
    assert words or not content.strip()


# ---------------------------------------------------------------------- wrong answers

OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "deed",
    [
        Reply(b""),
        Reply(b"<html>Welcome</html>", headers={"Content-Type": "text/html"}),
        Reply(b'{"choices": [{"text": "x"'),
        Reply([]),
        Reply(None),
        Reply({}),
        Reply({"choices": []}),
        Reply({"choices": [{}]}),
        Reply({"choices": [{"text": None}]}),
        Reply({"choices": [{"text": "x"}, {"text": "y", "index": 1}]}),
        Reply({"choices": "x"}),
        Reply(b'{"choices": [{"text": "\xff"}]}'),
        Reply(b'{"choices": [{"text": "\\ud800"}]}'),
        Reply(b'{"choices": ' + b"[" * 100_000),
        Reply(b'{"choices": ' + b"1" * 5000 + b"}"),
        Reply(b"", status=204),
        Reply(b"", status=202),
        Reply(b"x" * 3000),
        Reply(b"x" * 3000, status=500),
        Reply(b"x", headers={"Content-Encoding": "gzip"}),
        Raw(OK + b"Content-Length: none\r\n\r\n"),
        Raw(b"no HTTP at all\r\n\r\n"),
        Raw(OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n"),
    ],
)
def test_a_wrong_answer_is_an_error_of_its_row(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, deed: Deed
) -> None:
    """A response that breaks the protocol is never an answer, and the other rows have theirs."""
    server.script = by_prompt(b=deed)
    monkeypatch.setenv("VLLM_TASKS_MAX_RESPONSE_BYTES", "2048")
    a, b, c = api().predict_batches(["a", "b", "c"], on_error="return")
    assert (a, c) == (answer_to("a"), answer_to("c"))
    assert isinstance(b, RowError)
    assert (b.index, b.kind) == (1, "response"), b


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_or_too_many_choices_are_no_answer(server: ScriptedServer, api: Make, n: int) -> None:
    """A request for two choices gets two, or an error."""
    server.script = lambda _: Reply({"choices": [{"index": i, "text": "x"} for i in range(n)]})
    error = only_error(api(), n=2)
    assert error.kind == "response"
    assert "2 choice(s)" in error.message


def test_chat_without_content_is_an_error(server: ScriptedServer, api: Make) -> None:
    """Null content is never an empty answer."""
    server.script = lambda _: Reply({"choices": [{"message": {"role": "assistant", "content": None}}]})
    assert only_error(api(server.url, chat=True)).kind == "response"


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    "said", [{"reasoning": "hm"}, {"content": "", "reasoning": "hm"}, {"tool_calls": CALLS}]
)
def test_an_answer_that_is_no_text_is_never_an_empty_text(
    server: ScriptedServer, api: Make, said: dict[str, Any]
) -> None:
    """If all tokens are reasoning or tool calls, the error shows them; `completions` returns them."""
    message = {"role": "assistant", "content": None, **said}
    server.script = lambda _: Reply({"choices": [{"message": message, "finish_reason": "stop"}]})
    model = api(server.url, chat=True)
    error = only_error(model)
    assert (error.kind, error.retryable) == ("output", False)
    assert "hm" in error.message or '"name": "f"' in error.message
    (completion,) = model.completions(["x"])
    assert isinstance(completion, Completion)
    assert completion.text == ""


def test_an_answer_that_a_filter_withholds_is_an_error(server: ScriptedServer, api: Make) -> None:
    """An answer that a gateway has truncated is an error, and is not sent again."""
    server.script = lambda _: Reply({"choices": [{"text": "so", "finish_reason": "content_filter"}]})
    error = only_error(api())
    assert (error.kind, error.retryable) == ("refused", False)
    assert "content_filter" in error.message
    assert len(server.posts) == 1


def test_a_legacy_text_without_the_prompt_is_an_error(server: ScriptedServer, api: Make) -> None:
    """A text that does not begin with its prompt belongs to another row or another server."""
    server.script = lambda _: Reply({"text": ["something else"]})
    assert only_error(api(server.url + "/generate")).kind == "response"


def test_a_row_that_always_breaks_its_connection_is_its_own_error(server: ScriptedServer, api: Make) -> None:
    """While the server answers others, a connection that always breaks is the row's failure."""
    server.script = by_prompt(b=Raw(reset=True))
    a, b, c = api().predict_batches(["a", "b", "c"], on_error="return")
    assert (a, c) == (answer_to("a"), answer_to("c"))
    assert isinstance(b, RowError)
    assert (b.kind, b.retryable) == ("connection", True)
    assert [a.prompt for a in server.posts].count("b") == 2


def test_a_body_that_is_always_cut_is_an_error_of_kind_connection(server: ScriptedServer, api: Make) -> None:
    """An incomplete answer is no answer."""
    server.script = lambda _: Raw(OK + b'Content-Length: 99\r\n\r\n{"choices": [{"text": "x"}]}')
    assert only_error(api()).kind == "connection"


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
    assert 0.3 <= time.monotonic() - began < 20


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
        assert (await servers.take_slot()).url == f"{server.url}/well"

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

    async def script(asked: Asked) -> Deed:
        if asked.path == "/health":
            await asyncio.sleep(1)
        if asked.body and asked.prompt.endswith("00") and asked.prompt not in failed:
            failed.add(asked.prompt)
            return refused(502, "bad gateway")
        await asyncio.sleep(0.01)
        return None

    server.script = script
    xs = [str(i) for i in range(1, 400)]
    assert api(model=model, max_in_flight=8).predict_batches(xs) == [answer_to(x) for x in xs]
    sent = [asked.at for asked in server.posts[:390]]
    assert max(b - a for a, b in itertools.pairwise(sent)) < 0.7


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


# ---------------------------------------------------------------------- the end of a call


def test_an_interrupted_call_cancels_its_requests_and_leaves_the_model_usable(
    server: ScriptedServer, api: Make
) -> None:
    """Ctrl-C drops the open requests, so that vLLM stops generating, and frees the window."""
    server.script = hang
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
    server.script = hang
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
