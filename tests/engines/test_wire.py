"""The parsers of the three HTTP formats, against anything a server might send."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tasks.engines import wire
from vllm_tasks.engines.local.engine import result_of
from vllm_tasks.rows import Choice, Completion, Request, RowError, TokenLogprob

LOGPROB_TOP = {" a": -0.5, "b": -1.5}
TEXT_LOGPROBS = {"tokens": [" a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, LOGPROB_TOP]}
CHAT_TOKEN = {"token": " a", "logprob": -0.5, "top_logprobs": [{"token": " a", "logprob": -0.5}]}
PROMPT_LOGPROBS = [None, {"7": {"logprob": -0.25, "decoded_token": "P", "rank": 1}}]
USAGE = {"prompt_tokens": 1, "completion_tokens": 2}
TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}

REQUESTS = {
    "/generate": Request("P", {}),
    "/v1/completions": Request("P", {}),
    "/v1/chat/completions": Request([{"role": "user", "content": "P"}], {}),
}
TEXT_CHOICE = {
    "index": 0,
    "text": " a",
    "finish_reason": "stop",
    "token_ids": [1, 2],
    "logprobs": TEXT_LOGPROBS,
    "prompt_logprobs": PROMPT_LOGPROBS,
    "reasoning": "hm",
}
CHAT_CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": " a", "reasoning": "hm", "tool_calls": [TOOL_CALL]},
    "finish_reason": "stop",
    "token_ids": [1, 2],
    "logprobs": {"content": [CHAT_TOKEN]},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "/generate": {"text": ["P a"]},
    "/v1/completions": {"model": "m", "choices": [TEXT_CHOICE], "usage": USAGE},
    "/v1/chat/completions": {
        "model": "m",
        "choices": [CHAT_CHOICE],
        "usage": USAGE,
        "prompt_logprobs": PROMPT_LOGPROBS,
    },
}

paths = st.sampled_from(sorted(REQUESTS))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside a JSON value, itself included."""
    yield way
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield from places(inner, (*way, key))


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at one position."""
    if not way:
        return new
    value = copy.copy(value)
    value[way[0]] = changed(value[way[0]], way[1:], new)
    return value


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[str, Any]:
    path = draw(paths)
    way = draw(st.sampled_from(list(places(ANSWERS[path]))))
    return path, changed(ANSWERS[path], way, draw(anything))


def assert_sound_or_wrong(path: str, answer: Any) -> None:
    try:
        completion = wire.parse(path, REQUESTS[path], answer)
    except wire.WrongShape:
        return
    assert_sound(completion)


def assert_sound(completion: Completion) -> None:
    """Every value has the type that `rows` promises, and every text can be written down."""
    assert len(completion.choices) == 1
    for choice in completion.choices:
        choice.text.encode()
        (choice.finish_reason or "").encode()
        (choice.reasoning or "").encode()
        assert all(type(i) is int for i in choice.token_ids or ())
        assert all(isinstance(call, dict) for call in choice.tool_calls or ())
        for token in choice.logprobs or ():
            assert_sound_token(token)
    assert type(completion.prompt_tokens) in (int, type(None))
    assert type(completion.completion_tokens) in (int, type(None))
    (completion.model or "").encode()
    for first in completion.prompt_logprobs or ():
        if first is not None:
            assert_sound_token(first)


def assert_sound_token(token: TokenLogprob) -> None:
    assert isinstance(token.token, str)
    assert type(token.logprob) is float
    assert all(isinstance(t, str) and type(p) is float for t, p in token.top)


@given(paths, anything)
def test_any_json_value_is_a_completion_or_of_wrong_shape(path: str, answer: Any) -> None:
    """Any JSON parses to a sound Completion or raises WrongShape."""
    assert_sound_or_wrong(path, answer)


@given(nearly_right())
def test_a_right_answer_with_one_value_changed_is_sound_or_of_wrong_shape(case: tuple[str, Any]) -> None:
    """A valid answer with any value at any one position still gives a sound Completion or WrongShape."""
    path, answer = case
    assert_sound_or_wrong(path, answer)


@pytest.mark.parametrize("path", REQUESTS)
def test_deep_nesting_is_of_wrong_shape(path: str) -> None:
    """A value nested deeper than Python's recursion limit is reported, not a crash."""
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(wire.WrongShape):
        wire.parse(path, REQUESTS[path], {"text": deep, "choices": deep})


@given(st.text(), st.lists(st.text(), min_size=1, max_size=4))
def test_legacy_cuts_exactly_the_prompt_off(prompt: str, completions: list[str]) -> None:
    """The texts of the former api_server begin with the prompt; the rest is the completion."""
    answer = {"text": [prompt + c for c in completions]}
    parsed = wire.parse("/generate", Request(prompt, {"n": len(completions)}), answer)
    assert [c.text for c in parsed.choices] == completions


@given(st.permutations(range(4)))
def test_choices_come_in_the_order_of_their_index(order: list[int]) -> None:
    """Choices are sorted by their index, whatever the server's order."""
    answer = {"choices": [{"index": i, "text": str(i)} for i in order]}
    parsed = wire.parse("/v1/completions", Request("P", {"n": 4}), answer)
    assert [c.text for c in parsed.choices] == ["0", "1", "2", "3"]


NUMBERS: dict[str, dict[str, Any]] = {
    "embed": {"embedding": [0.5, 1]},
    "score": {"score": 0.5},
    "classify": {"probs": [0.5, 0.5], "label": "a"},
    "reward": {"probs": [0.5]},
}


@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_numbers_with_one_value_changed_are_finite_or_of_wrong_shape(task: Any, data: st.DataObject) -> None:
    """This also holds for whole numbers that no float can have."""
    answer = {"data": [NUMBERS[task]], "usage": {"prompt_tokens": 1}}
    way = data.draw(st.sampled_from(list(places(answer))))
    new = data.draw(anything | st.just(10**400))
    with suppress(wire.WrongShape):
        (choice,) = wire.parse("", Request("P", {}, task), changed(answer, way, new)).choices
        assert choice.data
        assert all(math.isfinite(number) for number in choice.data)


@pytest.mark.parametrize("indexes", [[0, 0], [0, None], [0, True], [0, 1, 2], [0]])
def test_choices_without_a_proper_index_are_of_wrong_shape(indexes: list[Any]) -> None:
    """A choice that is missing, doubled or has no proper index makes the complete answer unusable."""
    answer = {"choices": [{"index": i, "text": "x"} for i in indexes]}
    with pytest.raises(wire.WrongShape):
        wire.parse("/v1/completions", Request("P", {"n": 2}), answer)


def test_everything_that_the_protocol_carries_arrives() -> None:
    """Token ids, logprobs, reasoning, tool calls, usage and the model's name reach the Completion."""
    text = wire.parse("/v1/completions", REQUESTS["/v1/completions"], ANSWERS["/v1/completions"])
    (choice,) = text.choices
    assert (choice.text, choice.finish_reason, choice.token_ids, choice.reasoning) == (
        *(" a", "stop", [1, 2]),
        "hm",
    )
    assert choice.logprobs is not None
    assert choice.logprobs[0].logprob != choice.logprobs[0].logprob  # an echoed first token has none: NaN
    assert choice.logprobs[1] == TokenLogprob("b", -1.5, list(LOGPROB_TOP.items()))
    assert (text.prompt_tokens, text.completion_tokens, text.model) == (1, 2, "m")
    assert text.prompt_logprobs == [None, TokenLogprob("P", -0.25, [("P", -0.25)])]

    path = "/v1/chat/completions"
    chat = wire.parse(path, REQUESTS[path], ANSWERS[path])
    assert chat.choices == (
        Choice(
            text=" a",
            finish_reason="stop",
            token_ids=[1, 2],
            logprobs=[TokenLogprob(" a", -0.5, [(" a", -0.5)])],
            reasoning="hm",
            tool_calls=[TOOL_CALL],
        ),
    )
    assert chat.prompt_logprobs == text.prompt_logprobs

    as_chat = {"choices": [{**TEXT_CHOICE, "logprobs": CHAT_CHOICE["logprobs"]}]}  # llama.cpp's server
    of_text = wire.parse("/v1/completions", REQUESTS["/v1/completions"], as_chat)
    assert of_text.choices[0].logprobs == chat.choices[0].logprobs


@pytest.mark.parametrize(
    "extra", [{"tool_calls": [TOOL_CALL]}, {"reasoning": "hm"}, {"reasoning_content": "hm"}]
)
def test_chat_without_content_has_an_empty_text_only_beside_calls_or_reasoning(extra: dict[str, Any]) -> None:
    """Null content is an answer if the tokens went elsewhere, and of wrong shape otherwise."""
    path = "/v1/chat/completions"
    message = {"role": "assistant", "content": None}
    parsed = wire.parse(path, REQUESTS[path], {"choices": [{"message": message | extra}]})
    assert parsed.text == ""
    with pytest.raises(wire.WrongShape, match="content"):
        wire.parse(path, REQUESTS[path], {"choices": [{"message": message}]})


def test_a_text_that_no_table_could_hold_is_of_wrong_shape() -> None:
    """An escaped lone surrogate is valid JSON and no valid text."""
    answer = json.loads(r'{"choices": [{"text": "\ud800"}]}')
    with pytest.raises(wire.WrongShape, match="text"):
        wire.parse("/v1/completions", REQUESTS["/v1/completions"], answer)


def test_body_has_the_prompt_and_sampling_and_no_model_in_the_legacy_format() -> None:
    """The body is the prompt or the messages beside the sampling parameters."""
    messages = [{"role": "user", "content": "x"}]
    assert wire.body_of(Request("x", {"n": 2}), None) == {"prompt": "x", "n": 2}
    assert wire.body_of(Request("x", {}), "m") == {"model": "m", "prompt": "x"}
    assert wire.body_of(Request(messages, {"n": 2}), "m") == {"model": "m", "messages": messages, "n": 2}


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_the_engine_gave_up_is_an_error(reason: str) -> None:
    """vLLM's engine ends such a row like any other, with the text so far, but it is no answer."""
    answer = {"choices": [{"text": "", "finish_reason": reason}]}
    error = result_of({"answer": answer, "seconds": 0.1}, Request("P", {}))
    assert isinstance(error, RowError)
    assert (error.kind, error.retryable) == ("engine", True)
    assert reason in error.message
