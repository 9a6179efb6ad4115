"""The record is in the prompt: columns, keywords and messages that a prompt takes or refuses."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from tests.calls.prompting import prompter, refusal
from vllm_tasks import VllmAPI
from vllm_tasks.canonical import fingerprint
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Summarize this ticket in one sentence."},
        {"prompt": "Summarize: {{ input }}"},
        {"prompt": ""},
        {"prompt": "{context}"},
        {"prompt": "{artifacts.rules}", "artifacts": {"rules": {"uri": "memory://rules.txt"}}},
        {"prompt": "Summarize: {{title}}", "signature": "**kwargs"},
    ],
)
def test_a_prompt_without_its_record_is_refused(fields: dict[str, Any]) -> None:
    """All rows would get one answer; the error shows how to write a field."""
    with pytest.raises(ValueError, match="uses no field of the record"):
        VllmAPI(identifier="m", api_url="http://x", **fields)
    VllmAPI(identifier="m", api_url="http://x", **{**fields, "prompt_func": str})


@pytest.mark.parametrize(
    ("fields", "columns", "named"),
    [
        ({"signature": "**kwargs", "prompt": "{title}"}, ["title", "text"], "'text'"),
        ({"signature": "*args", "prompt": "{0}"}, ["title", "text"], "'text'"),
        ({"signature": "**kwargs", "prompt": "{a}"}, {"title": "a", "text": "b"}, "'text'"),
        ({"signature": "*args,**kwargs", "prompt": "{0} {b}"}, {"title": 0, "text": "b", "day": 1}, "'day'"),
    ],
)
def test_a_column_that_the_prompt_leaves_out_is_refused(
    fields: dict[str, Any], columns: Any, named: str
) -> None:
    """A table run refuses the column; a record of `predict` may have more fields than the prompt."""
    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, **fields)
    with pytest.raises(InvalidCall, match=f"never uses the columns {named} of X"):
        model.prepare(model.predict_in_db).over(columns)


def test_a_function_gets_the_keywords_that_it_names() -> None:
    """Such keywords count in the fingerprint; other keywords are sampling parameters."""

    def styled(x: str, style: str = "plain", *, context: str | None = None) -> str:
        return f"{style}: {x}"

    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, prompt_func=styled)
    call = model.prepare(model.predict, None, {"style": "formal", "max_tokens": 7})
    (request,) = call.requests(["hello"])
    assert isinstance(request, Request)
    assert (request.prompt, request.sampling) == ("formal: hello", {"max_tokens": 7})
    prints = {
        model.prepare(model.predict, None, given).over("x").fingerprint
        for given in ({}, {"style": "formal"}, {"style": "short"})
    }
    assert len(prints) == 3
    with pytest.raises(InvalidCall, match="did you mean 'style'"):
        model.prepare(model.predict, None, {"stile": "formal"})


def test_a_keyword_may_be_whatever_a_function_may_hold() -> None:
    """Functions as keywords have different fingerprints, and an uncertain one is refused as in a closure."""
    model = VllmAPI(
        identifier="m", api_url="http://x", model="x", chat=False, prompt_func=lambda x, style: style(x)
    )

    def printed(style: Any) -> str:
        return model.prepare(model.predict, None, {"style": style}).over("x").fingerprint

    assert printed(lambda x: x.upper()) != printed(lambda x: x.lower())
    assert printed(str.upper) == printed(str.upper)
    with pytest.raises(InvalidCall, match="the keywords of prompt_func"):
        printed(iter("ab"))


@pytest.mark.parametrize("style", ["", 0, False])
def test_a_keyword_that_is_falsy_is_given(style: Any) -> None:
    """A falsy keyword wins over a field of the record with the same name."""
    fields = {"signature": "**kwargs", "prompt_func": lambda text, style="plain": f"{style}: {text}"}
    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, **fields)  # type: ignore[arg-type]
    call = model.prepare(model.predict, None, {"style": style})
    with pytest.raises(InvalidCall, match="would be given twice"):
        call.over(["text", "style"])
    assert model.prepare(model.predict).requests([{"text": "a", "style": "b"}])[0] == Request("b: a", {})


def test_the_artifacts_are_the_models() -> None:
    """A keyword of that name does not replace the artifacts."""
    model = VllmAPI(identifier="m", api_url="http://x", chat=False, prompt_func=lambda x, artifacts: x)
    with pytest.raises(InvalidCall, match="artifacts"):
        model.prepare(model.predict, None, {"artifacts": {"rules": "none"}})


def test_a_keyword_is_not_both_for_the_function_and_for_vllm() -> None:
    """An ambiguous keyword is refused, but only if the call gives it."""
    model = VllmAPI(
        identifier="m", api_url="http://x", model="x", chat=False, prompt_func=lambda x, n=3: x * n
    )
    assert model.prepare(model.predict).requests(["a"])[0] == Request("aaa", {})
    with pytest.raises(InvalidCall, match="'n' is an argument of prompt_func and a sampling parameter"):
        model.prepare(model.predict, None, {"n": 2})


def test_messages_go_out_as_they_are_given() -> None:
    """No field of a message is added or changed."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":  1.50}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": [{"type": "text", "text": "x"}]},
    ]
    sent = prompter(chat=True)(messages)
    assert json.dumps(sent) == json.dumps(messages)


def test_two_system_messages_are_the_rows_error() -> None:
    """Which of them counts is not guessed."""
    rows = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    assert "remove one of them" in refusal(prompter(chat=True, system="be long")(rows))
    assert prompter(chat=True)(rows) == rows


def test_messages_may_be_json_as_in_a_csv() -> None:
    """Messages are parsed from JSON only with the option; otherwise such a text is a text."""
    rows = [{"role": "user", "content": "hi"}]
    text = json.dumps(rows)
    assert prompter(chat=True)(text) == [{"role": "user", "content": text}]
    read = prompter(chat=True, messages_as_json=True, system="be short")
    assert read(text) == [{"role": "system", "content": "be short"}, *rows]
    assert "is not JSON" in refusal(read("hi"))
    assert "not a list of chat messages" in refusal(read('"hi"'))
    assert read.identity() != prompter(chat=True, system="be short").identity()


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "Sum up: {input}"}, {"prompt_func": str}, {"signature": "**kwargs", "prompt": "{text}"}],
)
def test_messages_that_no_row_can_be_are_refused(fields: dict[str, Any]) -> None:
    """Otherwise the JSON text of the CSV would be sent as a text."""
    with pytest.raises(ValueError, match="messages_as_json=True reads a record that is chat messages"):
        VllmAPI(identifier="m", messages_as_json=True, **fields)


def test_a_column_that_the_call_fills_is_refused() -> None:
    """The column could never be in a prompt."""
    model = VllmAPI(
        identifier="m",
        model="m",
        chat=True,
        api_url="http://x",
        prompt="{context} {text}",
        signature="**kwargs",
    )
    with pytest.raises(InvalidCall, match=r"\['context'\] would be given twice, by X and by the call"):
        model.prepare(model.predict_in_db, "c").over(["context", "text"])


def test_the_first_parameter_is_the_record_whatever_its_name() -> None:
    """The record is the first parameter if a record is one value."""
    for function in (lambda context: context, lambda artifacts: artifacts):
        assert prompter(prompt_func=function)("a") == "a"
    with pytest.raises(InvalidCall, match="nothing uses it"):
        prompter(prompt_func=lambda context: context, context="c")


def test_a_prompt_that_a_function_replaces_does_not_count() -> None:
    """Such a prompt decides nothing, so it is not in the fingerprint."""
    assert prompter("a {input}", prompt_func=str).identity() == prompter(prompt_func=str).identity()


def test_data_of_an_artifact_counts_as_a_prompt_prints_it() -> None:
    """A function or a prompt file may list its pairs in their order, and 1.0 has another text than 1."""

    def with_data(data: Any) -> str:
        return fingerprint(prompter(prompt_func=str, artifacts={"x": data}).identity())

    assert with_data({"a": 1, "b": 2}) != with_data({"b": 2, "a": 1})
    assert with_data([1.0]) != with_data([1])
    assert with_data("[1]") != with_data([1])
    assert with_data({"a": 1}) == with_data({"a": 1})


@pytest.mark.parametrize("function", [lambda x, other: x, lambda: "x", lambda x, *, style: x])
def test_a_function_that_one_record_does_not_fit_is_refused_before_any_row(function: Any) -> None:
    """It would be the same error in every row."""
    with pytest.raises(InvalidCall, match="cannot be called with one record"):
        prompter(prompt_func=function)


def test_a_decorator_may_fill_in_an_argument() -> None:
    """What counts is what the decorated function takes, not the function in `__wrapped__`."""

    def with_style(function: Any) -> Any:
        @functools.wraps(function)
        def decorated(x: str) -> str:
            return str(function(x, "formal"))

        return decorated

    @with_style
    def styled(x: str, style: str) -> str:
        return f"{style}: {x}"

    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, prompt_func=styled)
    model.prepare(model.predict_in_db).over("text")
    (request,) = model.prepare(model.predict).requests(["hello"])
    assert isinstance(request, Request)
    assert request.prompt == "formal: hello"
