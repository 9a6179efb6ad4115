"""Over HTTP: refusals and wrong answers become errors of their rows, or of the call."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.engines.http.deeds import OK, Make, by_prompt, only_error
from tests.servers.scripted_server import Asked, Deed, Raw, Reply, ScriptedServer, answer_to, refused
from vllm_tasks import InvalidCall, RowError
from vllm_tasks.engines.http.transport import words_of
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Completion

pytestmark = pytest.mark.usefixtures("hasty")


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("temperature must be non-negative", "refused"),
        ("This model's maximum context length is 1024 tokens. However, ...", "too_long"),
        (
            "request (3031 tokens) exceeds the available context size (1024 tokens), try increasing it",
            "too_long",
        ),
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


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "api_key"),
        (402, "your credit"),
        (403, "api_key"),
        (404, "api_url and model"),
        (405, "api_url"),
        (410, "api_url and model"),
    ],
)
def test_what_is_wrong_with_the_call_raises_at_once(
    server: ScriptedServer, api: Make, status: int, hint: str
) -> None:
    """401, 404 and the like end the call with the server's message, and the remaining rows are not sent."""
    server.script = lambda _: refused(status, "you shall not pass")
    with pytest.raises(InvalidCall, match=f"you shall not pass.*{hint}"):
        api(max_in_flight=4).predict_batches([str(i) for i in range(200)])
    assert len(server.posts) < 20


@pytest.mark.parametrize("status", [302, 401, 403, 404])
@pytest.mark.parametrize(("bad", "in_flight"), [("150", 8), ("150", 1), ("0", 8)])
def test_a_row_that_alone_is_denied_is_its_own_error(
    server: ScriptedServer, api: Make, status: int, bad: str, in_flight: int
) -> None:
    """A redirect, 401, 403 or 404 for one row, even the first to return, leaves the others their answers."""

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


@pytest.mark.parametrize("status", [401, 402, 403, 404])
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


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"text": "so", "finish_reason": "content_filter"}, "content_filter"),
        ({"text": "", "finish_reason": "SAFETY"}, "SAFETY"),
        ({"finish_reason": "content_filter"}, "content_filter"),
        ({"message": {"content": None, "refusal": "I can't help"}, "finish_reason": "stop"}, "I can't help"),
        ({"message": {"content": "", "refusal": "I can't help"}, "finish_reason": "stop"}, "I can't help"),
    ],
)
def test_an_answer_that_is_withheld_is_an_error(
    server: ScriptedServer, api: Make, choice: dict[str, Any], why: str
) -> None:
    """An answer that a gateway has truncated, or a model refuses, is an error, and is not sent again."""
    server.script = lambda _: Reply({"choices": [choice]})
    error = only_error(api(server.url, chat="message" in choice))
    assert (error.kind, error.retryable) == ("refused", False)
    assert why in error.message
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"content": None, "refusal": "I cannot help"}, "withheld the answer (refusal 'I cannot help')"),
        ({"content": "", "refusal": "I cannot help"}, "withheld the answer (refusal 'I cannot help')"),
        ({"content": None}, "withheld the answer"),
    ],
)
def test_a_refusal_is_never_an_empty_text(
    server: ScriptedServer, api: Make, said: dict[str, Any], words: str
) -> None:
    """What a model or a filter refuses is the row's error, with the words of the refusal."""
    choice = {"message": {"role": "assistant", **said}, "finish_reason": "content_filter"}
    server.script = lambda _: Reply({"choices": [choice]})
    error = only_error(api(server.url, chat=True))
    assert (error.kind, error.retryable) == ("refused", False)
    assert words in error.message


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


@pytest.mark.parametrize("by", ["the model", "the site"])
def test_a_row_may_take_any_time(
    server: ScriptedServer, api: Make, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite timeout is none."""
    monkeypatch.setenv("VLLM_TASKS_TIMEOUT", "inf")
    assert api(timeout=math.inf if by == "the model" else None).predict("x") == answer_to("x")
