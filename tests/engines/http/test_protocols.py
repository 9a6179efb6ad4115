"""Over HTTP: the URL and the prompt pick the protocol, and the server names its model."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.engines.http.deeds import Make, serves
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
from vllm_tasks.engines.http import control
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.errors import ServerUnavailable

pytestmark = pytest.mark.usefixtures("hasty")


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
    with pytest.raises(InvalidCall, match=f"{host}.*(label empty|label too long)"):
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
