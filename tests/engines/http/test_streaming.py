"""Streamed answers: how pieces are put together, and what happens when a stream breaks off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.test_wire import anything, changed, places
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, answer_to
from vllm_tasks import InvalidCall, RowError, VllmAPI
from vllm_tasks.engines.http.streaming import Ended, Pieces
from vllm_tasks.results import Choice, TokenLogprob

DONE = "[DONE]"
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
CHAT = [{"role": "user", "content": "x"}]


def events(*pieces: Any, done: bool = True, line: str = "\n") -> bytes:
    """A stream as vLLM sends it."""
    told = [piece if isinstance(piece, str) else json.dumps(piece) for piece in (*pieces, *([DONE] * done))]
    return "".join(f"data: {data}{line}{line}" for data in told).encode()


def text(part: str, end: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "text": part, "finish_reason": end, "logprobs": None, **more}
    return {"id": "cmpl-1", "model": "m", "choices": [choice]}


def chat(delta: dict[str, Any] | None, end: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None, **more}
    return {"id": "chatcmpl-1", "model": "m", "choices": [choice]}


def streaming(content: bytes) -> Callable[[Asked], Reply | None]:
    """A script that sends this stream to each streamed request."""
    reply = Reply(content, headers={"Content-Type": "text/event-stream; charset=utf-8"})
    return lambda asked: reply if asked.body and asked.body.get("stream") else None


@pytest.fixture
def model(server: ScriptedServer) -> Iterator[VllmAPI]:
    fields: dict[str, Any] = {"model": "m", "retries": 0, "chat": False, "stream": True}
    with VllmAPI(identifier="a", api_url=server.url, **fields) as model:
        yield model


def only(model: VllmAPI, prompt: Any = "x", **sampling: Any) -> Any:
    (completion,) = model.completions([prompt], on_error="return", **sampling)
    return completion


def test_pieces_are_put_together(server: ScriptedServer, model: VllmAPI) -> None:
    """Text, finish reason and token counts are read, among comments that only keep the connection alive."""
    kept = b": ping\r\n\r\n"
    server.script = streaming(
        events(text("Par"), done=False, line="\r\n") + kept + events(text("is"), text("", "stop"), USAGE)
    )
    completion = only(model)
    assert completion.choices == (Choice(text="Paris", finish_reason="stop"),)
    assert (completion.prompt_tokens, completion.completion_tokens, completion.model) == (3, 5, "m")
    (asked,) = server.posts
    assert (asked.body["stream"], asked.body["stream_options"]) == (True, {"include_usage": True})


def test_several_choices_come_mixed(server: ScriptedServer, model: VllmAPI) -> None:
    """Each piece goes to the choice of its index, in any order."""
    mixed = [text("b", index=1), text("a", index=0), text("B", "stop", 1), text("A", "length", 0)]
    server.script = streaming(events(*mixed))
    ended = [(choice.text, choice.finish_reason) for choice in only(model, n=2).choices]
    assert ended == [("aA", "length"), ("bB", "stop")]


def test_logprobs_and_token_ids_grow_with_the_text(server: ScriptedServer, model: VllmAPI) -> None:
    """One entry a token, in order."""

    def told(token: str, logprob: float) -> dict[str, Any]:
        return {"tokens": [token], "token_logprobs": [logprob], "top_logprobs": [{token: logprob}]}

    server.script = streaming(
        events(
            text("a", logprobs=told("a", -1.0), token_ids=[7]),
            text("b", "stop", logprobs=told("b", -2.0), token_ids=[8]),
        )
    )
    (choice,) = only(model, logprobs=1).choices
    assert choice.logprobs == [TokenLogprob("a", -1.0, [("a", -1.0)]), TokenLogprob("b", -2.0, [("b", -2.0)])]
    assert choice.token_ids == [7, 8]


def test_reasoning_and_tool_calls_come_in_pieces_too(server: ScriptedServer, model: VllmAPI) -> None:
    """The pieces of a call's arguments become one text, and the index distinguishes calls."""

    def call(index: int, arguments: str, **begun: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **begun, "function": {"arguments": arguments}}]}

    first = {"index": 0, "id": "c0", "type": "function", "function": {"name": "time", "arguments": ""}}
    second = {"index": 1, "id": "c1", "type": "function", "function": {"name": "place", "arguments": "{}"}}
    server.script = streaming(
        events(
            chat({"role": "assistant", "content": ""}),
            chat({"reasoning": "Let me "}),
            chat({"reasoning": "see."}),
            chat({"tool_calls": [first]}),
            chat(call(0, '{"city": ')),
            chat(call(0, '"Rome"}')),
            chat({"tool_calls": [second]}, "tool_calls"),
        )
    )
    (choice,) = only(model, CHAT).choices
    assert choice.reasoning == "Let me see."
    assert choice.tool_calls == [
        {"id": "c0", "type": "function", "function": {"name": "time", "arguments": '{"city": "Rome"}'}},
        {"id": "c1", "type": "function", "function": {"name": "place", "arguments": "{}"}},
    ]


STREAM = events(
    chat({"role": "assistant"}), chat({"content": "ü 🦊"}), chat({"content": "\n\n"}, "stop"), USAGE
)


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
def test_it_does_not_matter_where_the_network_cuts_a_stream(cuts: list[int]) -> None:
    """The network may split a stream in the middle of a line or a character."""
    pieces = Pieces()
    for begin, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True):
        pieces.take(STREAM[begin:end])
    whole = pieces.complete()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "ü 🦊\n\n"}
    assert whole["usage"] == USAGE["usage"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (events(text("Par"), done=False), "connection", "ended before the answer was complete"),
        (events(text("Par")), "connection", "ended before the answer was complete"),
        (events(text("Paris", "stop"), done=False), "connection", "ended before the answer was complete"),
        (events(text("Par"), USAGE, done=False), "connection", "ended before the answer was complete"),
        (events(text("a"), {"error": {"message": "bad row", "code": 400}}), "refused", "HTTP 400 .*bad row"),
        (events(text("a"), {"error": {"message": "lost it", "code": 500}}), "server", "HTTP 500 .*lost it"),
        (events(text("a"), {"error": {"message": "lost it"}}), "server", "HTTP 500 .*lost it"),
        (events({"error": {"message": "bad row", "code": "400"}}), "refused", "HTTP 400 .*bad row"),
        (b'event: error\ndata: {"message": "lost it"}\n\n', "connection", "its last piece .*lost it"),
        (events(chat(None, "stop")), "response", "a string"),
        (events("{"), "response", "in the stream"),
        (events([1]), "response", "expected an object"),
        (events({"choices": 5}), "response", "in the stream"),
        (events(chat("Paris", "stop")), "response", "not an answer in pieces"),  # type: ignore[arg-type]
        (events(chat({"tool_calls": "f"}, "stop")), "response", "not an answer in pieces"),
        (events(chat({"tool_calls": ["f"]}, "stop")), "response", "not an answer in pieces"),
        (events(text("a"), text(5, "stop")), "response", "does not fit"),  # type: ignore[arg-type]
        (events("[" * 100_000), "response", "in the stream"),
        (events(), "response", "choices"),
        (events(text("", "abort")), "server", "abort"),
        (events(text("a", "content_filter")), "refused", "withheld"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(
    server: ScriptedServer, model: VllmAPI, content: bytes, kind: str, words: str
) -> None:
    """A stream that breaks off, ends in an error or is no stream is never a partial answer."""
    server.script = streaming(content)
    error = only(model)
    assert isinstance(error, RowError)
    assert error.kind == kind
    assert re.search(words, error.message)


CALLED = {"index": 0, "id": "c0", "function": {"name": "f", "arguments": "{}"}}
PIECES = [chat({"role": "assistant", "content": ""}), chat({"tool_calls": [CALLED]}, "stop"), USAGE]


@given(st.data())
def test_a_stream_with_one_value_changed_is_an_answer_or_an_error(data: st.DataObject) -> None:
    """Whatever a gateway sends, it is the error of its row and not that of the call."""
    way = data.draw(st.sampled_from([way for way in places(PIECES) if way]))
    pieces = Pieces()
    with suppress(Ended, ValueError):
        pieces.take(events(*changed(PIECES, way, data.draw(anything))))
        assert isinstance(pieces.complete(), dict)


def test_a_stream_that_ends_with_token_counts_is_complete(server: ScriptedServer, model: VllmAPI) -> None:
    """`transformers serve` sends them in the piece with the finish reason, and no last event."""
    last = {**text("ris", "stop"), "usage": USAGE["usage"]}
    server.script = streaming(events(text("Pa"), last, done=False))
    completion = only(model)
    assert (completion.text, completion.completion_tokens) == ("Paris", 5)


def test_the_mark_of_an_encoding_takes_no_piece_along(server: ScriptedServer, model: VllmAPI) -> None:
    """A stream may begin with a byte order mark, which is no part of its first line."""
    server.script = streaming(b"\xef\xbb\xbf" + events(text("Par"), text("is", "stop"), USAGE))
    assert only(model).text == "Paris"


def test_a_stream_that_breaks_off_is_tried_again(server: ScriptedServer) -> None:
    """It is retried like any other broken connection."""
    broken = [events(text("Par"), done=False)]
    whole = events(text("Paris", "stop"), USAGE)

    def script(asked: Asked) -> Reply | None:
        return streaming(broken.pop() if broken else whole)(asked)

    server.script = script
    with VllmAPI(identifier="a", api_url=server.url, model="m", retries=1, chat=False, stream=True) as model:
        assert model.predict("x") == "Paris"


def test_a_server_that_answers_whole_is_understood(server: ScriptedServer, model: VllmAPI) -> None:
    """Some servers ignore `stream` and send the complete answer."""
    assert model.predict("x") == answer_to("x")


def test_logprobs_of_the_prompt_come_whole(server: ScriptedServer, model: VllmAPI) -> None:
    """vLLM silently leaves prompt logprobs out of a stream, so such a request is not streamed."""
    assert model.predict("x", prompt_logprobs=1, max_tokens=1) == answer_to("x")
    (asked,) = server.posts
    assert "stream" not in asked.body


def test_a_stream_may_be_no_larger_than_any_answer(
    server: ScriptedServer, model: VllmAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TASKS_MAX_RESPONSE_BYTES", "2000")
    server.script = streaming(events(*[text("a")] * 50, text("", "stop")))
    error = only(model)
    assert error.kind == "response"
    assert "larger than 2000 bytes" in error.message


def test_the_legacy_format_is_not_streamed() -> None:
    """Its pieces have another format, which no current server uses."""
    model = VllmAPI(identifier="a", api_url="http://127.0.0.1:9/generate", stream=True)
    with pytest.raises(InvalidCall, match="stream=True needs OpenAI's protocol"):
        model.predict("x")


def test_no_part_of_a_key_that_a_stream_repeats_is_shown(server: ScriptedServer) -> None:
    """This also holds where an error shows the beginning and the end of a response."""
    key = "sk-" + "0123456789" * 15
    server.script = streaming(events([f"you sent {key}"]))
    fields: dict[str, Any] = {"model": "m", "retries": 0, "chat": False, "api_key": key}
    with VllmAPI(identifier="a", api_url=server.url, **fields, stream=True) as model:
        error = only(model)
    assert isinstance(error, RowError)
    assert "it repeats api_key" in error.message
    assert "0123456789" not in error.message
