"""Servers behind gateways and proxies, and servers that are not the newest vLLM."""

from __future__ import annotations

import json
import logging
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.scripted_proxy import ScriptedProxy
from tests.servers.scripted_server import (
    MODEL,
    Asked,
    Deed,
    Raw,
    Reply,
    ScriptedServer,
    answer_to,
    refused,
    usual,
)
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.calls.sampling import names_version
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.proxies import proxy_of
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.errors import RowErrors, ServerUnavailable

SECRET = "s3cret-0123456789"
Make = Callable[..., VllmAPI]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.1")


@pytest.fixture
def api(server: ScriptedServer) -> Iterator[Make]:
    """Makes a `VllmAPI` of the server, and closes it after the test."""
    made: list[VllmAPI] = []

    def make(api_url: str = "", **fields: Any) -> VllmAPI:
        fields = {"retries": 0, "chat": False, **fields}
        made.append(VllmAPI(identifier="a", api_url=api_url or server.url, **fields))
        return made[-1]

    yield make
    for model in made:
        model.close()


# ---------------------------------------------------------------------- what admits us


def test_further_headers_are_sent_with_every_request_and_shown_nowhere(
    server: ScriptedServer, api: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows and control calls have them; no display of the model or its engine has their values."""
    caplog.set_level(logging.DEBUG)
    model = api(headers={"X-Api-Key": SECRET, "X-Team": "blue"})
    assert model.predict("x") == answer_to("x")
    assert len(server.requests) > 1
    assert {(a.headers["X-Api-Key"], a.headers["X-Team"]) for a in server.requests} == {(SECRET, "blue")}
    shown = repr(model) + str(model) + repr(model.engine_config()) + model.model_dump_json() + caplog.text
    assert SECRET not in shown


def test_a_user_and_password_are_sent_as_basic_authentication(server: ScriptedServer, api: Make) -> None:
    """The password may have colons and letters that ASCII lacks."""
    model = api(basic_auth="me:pä:ss", model="m")
    assert model.predict("x") == answer_to("x")
    encoded = b64encode("me:pä:ss".encode()).decode()
    assert [a.headers["Authorization"] for a in server.requests] == [f"Basic {encoded}"]
    assert "pä" not in repr(model) + repr(model.engine_config())


@pytest.mark.parametrize(
    "fields",
    [
        {"headers": {"X-Api-Key": SECRET}},
        {"headers": {"Authorization": f"Token {SECRET}"}},
        {"basic_auth": f"me:{SECRET}"},
    ],
)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_server_that_echoes_a_secret_does_not_get_it_into_errors(
    server: ScriptedServer, api: Make, fields: dict[str, Any], status: int
) -> None:
    """Values, the part after the scheme and the password alone are all hidden."""
    encoded = b64encode(f"me:{SECRET}".encode()).decode()
    server.script = lambda asked: refused(status, f"bad {SECRET} {encoded}") if asked.body else None
    with pytest.raises((InvalidCall, RowErrors)) as raised:
        api(model="m", **fields).predict("x")
    assert SECRET not in str(raised.value)
    if "basic_auth" in fields:
        assert encoded not in str(raised.value)


def test_a_password_is_hidden_in_bytes_too(server: ScriptedServer, api: Make) -> None:
    """Letters that ASCII lacks are two bytes each in a text, and an escape in JSON."""
    for said in ("pässwörd".encode(), b'{"message": "p\\u00e4ssw\\u00f6rd"}'):
        reply = Reply(said, 400)
        server.script = lambda asked, reply=reply: reply if asked.body else None  # type: ignore[misc]
        with pytest.raises(RowErrors, match=r"\*\*\*") as raised:
            api(model="m", basic_auth="me:pässwörd").predict("x")
        assert "ssw" not in str(raised.value)


@pytest.mark.parametrize("key", ["scripted", "model", "-", "data"])
def test_a_key_that_is_part_of_a_models_name_changes_no_request(
    server: ScriptedServer, api: Make, key: str
) -> None:
    """Servers without a key get any word, such as "x"."""
    assert api(api_key=key).predict("x") == answer_to("x")
    assert server.posts[0].body["model"] == MODEL


def test_a_key_among_the_names_of_models_is_not_shown(server: ScriptedServer, api: Make) -> None:
    listed = Reply({"data": [{"id": f"{SECRET}-{i}", "owned_by": "vllm"} for i in "ab"]})
    server.script = lambda asked: listed if asked.path == "/v1/models" else None
    with pytest.raises(InvalidCall, match=r"choose one, as in model='\*\*\*-a'") as raised:
        api(api_key=SECRET).predict("x")
    assert SECRET not in str(raised.value)
    with pytest.raises(InvalidCall, match=r"serves '\*\*\*-a', '\*\*\*-b', and the model 'm'") as raised:
        loop.run(sharing.check_served(api(api_key=SECRET, model="m").engine_config(), None))
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_server_that_lists_no_models_is_not_checked(server: ScriptedServer, api: Make, status: int) -> None:
    """A gateway may pass on only the paths of rows."""
    server.script = lambda asked: refused(status, "no") if asked.path == "/v1/models" else None
    model = api(model="m")
    loop.run(sharing.check_served(model.engine_config(), 8))
    assert model.predict("x") == answer_to("x")


@pytest.mark.parametrize("status", [408, 409, 425, 429, 503])
def test_models_that_cannot_be_listed_yet_are_waited_for(
    server: ScriptedServer, api: Make, status: int
) -> None:
    """The statuses are those of rows that are sent again."""
    early = [refused(status, "not yet")]
    server.script = lambda asked: early.pop() if early and asked.path == "/v1/models" else None
    assert api(model=None).predict("x") == answer_to("x")
    assert not early


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"headers": {"bad name": SECRET}}, "not the name of an HTTP header"),
        ({"headers": {"content-type": SECRET}}, "itself sets"),
        ({"headers": {"X-Request-ID": SECRET}}, "itself sets"),
        ({"headers": {"X": f"{SECRET}\n"}}, "needs .strip"),
        ({"headers": {"X": 7}}, "is not a text"),
        ({"headers": f"X: {SECRET}"}, "dict"),
        ({"basic_auth": SECRET}, "not of the form 'user:password'"),
        ({"basic_auth": f"me:{SECRET}", "api_key": SECRET}, "api_key and basic_auth both set"),
        ({"headers": {"authorization": SECRET}, "api_key": SECRET}, "api_key and headers both set"),
        ({"api_url": f"http://me:{SECRET}@h"}, "use basic_auth="),
        ({"api_url": f"http://h?api-key={SECRET}"}, "'api-key' in its query"),
        ({"api_url": f"http://h/v1?v=1&sig={SECRET}"}, "'sig' in its query"),
    ],
)
def test_what_cannot_be_sent_or_would_be_shown_is_refused(fields: dict[str, Any], said: str) -> None:
    """The refusal says what is wrong, without the secret."""
    with pytest.raises(ValueError, match=said) as raised:
        VllmAPI(**{"identifier": "m", "api_url": "http://h", **fields})
    assert SECRET not in str(raised.value)


def test_headers_of_ones_own_take_the_place_of_the_sites_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a header named Authorization, or a user with a password, does; other headers go beside the key."""
    monkeypatch.setenv("VLLM_TASKS_API_KEY", "of-the-site")

    def sent(**fields: Any) -> str:
        model = VllmAPI(identifier="m", api_url="http://h", **fields)
        return {k.lower(): v for k, v in model.engine_config().credentials.headers().items()}["authorization"]

    assert sent() == sent(headers={"X": "y"}) == "Bearer of-the-site"
    assert sent(headers={"authorization": "Own"}) == "Own"
    assert sent(basic_auth="u:p") == "Basic dTpw"


# ---------------------------------------------------------------------- paths and queries


@pytest.mark.parametrize(
    ("path", "rows", "models", "health", "protocol"),
    [
        ("", "/v1/completions", "/v1/models", "/health", "openai"),
        ("/a/v1", "/a/v1/completions", "/a/v1/models", "/a/health", "openai"),
        ("/api/v3/", "/api/v3/completions", "/api/v3/models", "/api/health", "openai"),
        ("/d/x/completions", "/d/x/completions", "/d/x/models", "/d/x/health", "completions"),
        ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "chat"),
        ("/g/generate", "/g/v1/completions", "/g/v1/models", "/g/health", "legacy"),
    ],
)
def test_a_base_path_belongs_to_all_requests(
    path: str, rows: str, models: str, health: str, protocol: str
) -> None:
    """/v1 is added only where neither a version nor a complete path is there."""
    (endpoint,), found = split_urls(f"http://h{path}?api-version=1")
    assert found == protocol
    shown = [endpoint.shown(path) for path in ("/v1/completions", "/v1/models", "/health")]
    assert shown == [f"http://h{path}" for path in (rows, models, health)]
    assert endpoint.url_of("/health") == f"http://h{health}?api-version=1"
    assert "api-version" not in f"{endpoint}{endpoint!r}"


def test_rows_go_to_a_deployments_own_path_with_its_query(server: ScriptedServer, api: Make) -> None:
    """As behind Azure's API: a path without /v1 and a query, which no error shows."""
    path = "/openai/deployments/x/chat/completions"
    answer = usual(Asked("/v1/chat/completions", {}, {"model": "m", "messages": [{"content": "x"}]}, 0.0))
    server.script = lambda asked: answer if asked.path == path else refused(404, "no such path")
    model = api(f"{server.url}{path}?api-version=2026-01-01", model="m", chat=None)
    assert model.predict("x") == answer_to("x")
    assert {(a.path, a.query) for a in server.posts} == {(path, "api-version=2026-01-01")}
    server.script = lambda _: refused(400, "no")
    with pytest.raises(RowErrors, match=f"HTTP 400 from {server.url}{path}: 'no'"):
        model.predict("x")


def test_control_calls_have_the_query_too(server: ScriptedServer, api: Make) -> None:
    """Models, health and the chat template are looked up with the same query as rows."""
    assert api(f"{server.url}/v1?tenant=a%20b", chat=None).predict("x") == answer_to("x")
    assert {a.query for a in server.requests} == {"tenant=a%20b"}
    assert {"/v1/models", "/tokenize"} < {a.path for a in server.requests}


# ---------------------------------------------------------------------- proxies


def test_rows_and_control_calls_go_through_the_proxy_of_the_environment(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy looks up the host, which this machine does not know, and gets its own password."""
    proxy = server.url.replace("://", "://user:pa55word@")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    model = api("http://gateway.test:8000")
    assert model.predict("x") == answer_to("x")
    encoded = b64encode(b"user:pa55word").decode()
    assert {a.headers["Host"] for a in server.requests} == {"gateway.test:8000"}
    assert {a.headers["Proxy-Authorization"] for a in server.requests} == {f"Basic {encoded}"}
    assert "pa55word" not in repr(model.engine_config())


def test_encrypted_rows_go_through_a_tunnel(
    encrypted: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, certificate: Path
) -> None:
    """The proxy sees the host alone, neither the key nor the rows."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with ScriptedProxy(("127.0.0.1", encrypted.port)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        model = api("https://gateway.test", api_key=SECRET)
        assert model.predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
        model.close()
        assert {head.split()[1] for head in proxy.seen} == {"gateway.test:443"}
        assert SECRET not in "".join(proxy.seen)


@pytest.mark.parametrize("model", [None, "m"])
@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (407, InvalidCall, "the user and password of the proxy"),
        (502, ServerUnavailable, "HTTP 502 from the proxy"),
    ],
)
def test_a_proxy_that_makes_no_tunnel_is_named_without_its_password(
    api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None, status: int, error: Any, said: str
) -> None:
    """A wrong password is the call's fault at once; any other refusal is waited for, like a server's."""
    with ScriptedProxy(("127.0.0.1", 9), status) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(error, match=said) as raised:
            api("https://gateway.test", model=model).predict("x")
    chain, cause = str(raised.value), raised.value.__cause__
    while cause is not None:
        chain, cause = chain + str(cause), cause.__cause__
    assert "pa55word" not in chain


@pytest.mark.parametrize(
    ("url", "no_proxy", "found"),
    [
        ("http://gateway.test", "", "http://proxy:3128"),
        ("https://gateway.test", "", None),
        ("http://gateway.test", "other.test,gateway.test", None),
        ("http://a.gateway.test", ".gateway.test", None),
        ("http://gateway.test:8000", "gateway.test:9000", "http://proxy:3128"),
        ("http://10.1.2.3:8000", "10.0.0.0/8", None),
        ("http://11.1.2.3:8000", "10.0.0.0/8", "http://proxy:3128"),
        ("http://gateway.test", "*", None),
        ("http://localhost:8000", "", None),
        ("http://127.0.0.1:8000", "", None),
        ("http://[::1]:8000", "", None),
    ],
)
def test_no_proxy_has_hosts_domains_and_networks(
    monkeypatch: pytest.MonkeyPatch, url: str, no_proxy: str, found: str | None
) -> None:
    """This machine is never reached through a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_of(url) == found


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the variable and the way out, and not the password."""
    monkeypatch.setenv("HTTP_PROXY", f"socks5://me:{SECRET}@proxy:1080")
    with pytest.raises(InvalidCall, match=r"HTTP_PROXY.*'socks5'.*'gateway\.test' to NO_PROXY") as raised:
        VllmAPI(identifier="m", api_url="http://gateway.test").predict("x")
    assert SECRET not in str(raised.value)


# ---------------------------------------------------------------------- versions of vLLM


def of_version(version: str, owner: str = "vllm") -> Callable[[Asked], Deed]:
    """A script of a server that reports this version."""

    def script(asked: Asked) -> Deed:
        if asked.path == "/version":
            return Reply({"version": version})
        if asked.path == "/v1/models":
            return Reply({"data": [{"id": MODEL, "owned_by": owner}]})
        return None

    return script


@pytest.mark.parametrize(
    ("version", "owner", "is_refused"),
    [
        ("0.11.2", "vllm", True),
        ("0.12.0", "vllm", False),
        ("0.1.dev1+gabc", "vllm", False),
        ("0.1.7", "gateway", False),
    ],
)
def test_a_server_that_would_ignore_structured_outputs_is_refused(
    server: ScriptedServer, api: Make, version: str, owner: str, is_refused: bool
) -> None:
    """Only a release of vLLM itself says which parameters it has; without the parameter nobody asks."""
    server.script = of_version(version, owner)
    model = api(model=MODEL)
    model.predict("x", max_tokens=5)
    assert "/version" not in {a.path for a in server.requests}
    if is_refused:
        with pytest.raises(InvalidCall, match=rf"vLLM {version}, which ignores structured_outputs.*0\.12"):
            model.predict("x", structured_outputs={"regex": "a"})
    else:
        model.predict_batches(["x", "y"], structured_outputs={"regex": "a"})
        model.predict("x", structured_outputs={"regex": "a"})
        assert [a.path for a in server.requests].count("/version") <= 1
    assert (len(server.posts) == 1) == is_refused


def test_a_server_newer_than_the_known_names_gets_unknown_ones(
    server: ScriptedServer, api: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a warning, with the closest known name; the version is looked up for an unknown name only."""
    server.script = of_version("99.0.1")
    model = api(model=MODEL, predict_kwargs={"temperature": 0.5})
    assert server.requests == []
    assert model.predict("x", temprature=0) == answer_to("x")
    assert server.posts[-1].body["temprature"] == 0
    (warning,) = caplog.messages
    assert "'temprature' is not known here" in warning
    assert "did you mean 'temperature'" in warning
    later = api(model=MODEL, predict_kwargs={"top_q": 1})
    assert later.predict("x") == answer_to("x")


@pytest.mark.parametrize("version", [names_version(), "0.9.0", "0.1.dev5", ""])
def test_a_server_that_is_not_newer_gets_no_unknown_name(
    server: ScriptedServer, api: Make, version: str
) -> None:
    """Nor does one whose version is not known, or one that is away."""
    server.script = of_version(version)
    with pytest.raises(InvalidCall, match="did you mean 'temperature'"):
        api(model=MODEL).predict("x", temprature=0)
    server.stop()
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        api(model=MODEL, predict_kwargs={"temprature": 0})
    assert server.posts == []


@pytest.mark.parametrize(
    "proxy",
    [
        f"http://me:{SECRET}@127.0.0.1:1",
        f"http://me:{SECRET}@127.0.0.1:{{garbled}}",
        f"https://me:{SECRET}@127.0.0.1:{{garbled}}",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_error_of_a_proxy_shows_its_password(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, scheme: str, proxy: str
) -> None:
    """Neither one that is away nor one that speaks no HTTP; causes are searched, too."""
    server.script = lambda _: Raw(b"garbage\r\n\r\n")
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.format(garbled=server.port))
    for model in (None, "m"):
        with pytest.raises((InvalidCall, ServerUnavailable, RowErrors)) as raised:
            api(f"{scheme}://gateway.test", model=model, retries=0).predict("x")
        assert SECRET not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("rest", ["@proxy:port", "@[::1:3128", "/b@proxy:3128"])
def test_a_proxy_whose_url_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, rest: str) -> None:
    """The refusal names the variable, and does not repeat it."""
    monkeypatch.setenv("HTTP_PROXY", f"http://me:{SECRET}{rest}")
    with pytest.raises(InvalidCall, match="HTTP_PROXY in the environment is not a URL") as raised:
        VllmAPI(identifier="m", api_url="http://gateway.test").predict("x")
    assert SECRET not in "".join(traceback.format_exception(raised.value))


# ---------------------------------------------------------------------- what they answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [[], [{"index": 0, "text": "Par", "finish_reason": "stop"}]])
@pytest.mark.parametrize(
    ("code", "kind", "sent"),
    [(400, "refused", 1), ("400", "refused", 1), (500, "server", 2), ("overloaded_error", "server", 2)],
)
def test_an_error_within_a_response_is_one(
    server: ScriptedServer, api: Make, code: Any, kind: str, sent: int, choices: list[Any], stream: bool
) -> None:
    """Gateways that have begun to respond cannot change the status any more (OpenRouter)."""
    failed = {"error": {"message": "the provider disconnected", "code": code}, "choices": choices}
    body, form = json.dumps(failed).encode(), "application/json"
    if stream:
        body, form = b"data: " + body + b"\n\ndata: [DONE]\n\n", "text/event-stream"
    reply = Reply(body, headers={"Content-Type": form})
    server.script = lambda asked: reply if asked.body and asked.prompt == "x" else None
    model = api(model="m", stream=stream, retries=1)
    error, whole = model.predict_batches(["x", "y"], on_error="return")
    assert (error.kind, whole) == (kind, answer_to("y"))
    assert "the provider disconnected" in error.message
    assert [asked.prompt for asked in server.posts].count("x") == sent


def test_an_error_within_a_response_may_be_that_of_a_full_server(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs no attempt of its row, as the status 429."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "60")
    limited = [Reply({"error": {"message": "limited upstream", "code": 429}})] * 3
    server.script = lambda asked: limited.pop() if asked.body and limited else None
    assert api(model="m", max_in_flight=1).predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]


def test_an_answer_about_errors_is_an_answer(server: ScriptedServer, api: Make) -> None:
    """Neither the words in a text nor an empty field are an error."""
    said = '{"error": {"code": 500}}'
    choice = {"index": 0, "text": said, "finish_reason": "stop"}
    server.script = lambda asked: Reply({"choices": [choice], "error": None}) if asked.body else None
    assert api(model="m").predict("x") == said


@pytest.mark.parametrize("reason", ["model_length", "MAX_TOKENS", "model_context_window_exceeded"])
def test_a_truncated_answer_is_one_by_any_name(
    server: ScriptedServer, api: Make, reason: str, tmp_path: Path
) -> None:
    """Mistral, Gemini and GLM have names of their own for it, which `on_length` has to know."""
    choice = {"index": 0, "text": "Par", "finish_reason": reason}
    server.script = lambda asked: Reply({"choices": [choice]}) if asked.body else None
    (tmp_path / "t.csv").write_text("id,q\n1,x\n")
    model = api(model="m", model_update_kwargs={"on_length": "error"})
    report = model.predict_in_db("q", "t", db=str(tmp_path), max_failed=None)
    assert (report.truncated, report.failed) == (1, 1)


def test_an_answer_that_was_given_up_is_none_in_capitals_either(server: ScriptedServer, api: Make) -> None:
    choice = {"index": 0, "text": "Par", "finish_reason": "ERROR"}
    server.script = lambda asked: Reply({"choices": [choice]}) if asked.body and asked.prompt == "x" else None
    error, _ = api(model="m").predict_batches(["x", "y"], on_error="return")
    assert "ended the row early (ERROR)" in error.message
