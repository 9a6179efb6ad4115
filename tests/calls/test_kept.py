"""What tables keep beside an answer: the columns, their values, and what is requested for them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from tests.calls.decoding import decoder
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.calls.kept import Kept
from vllm_tasks.results import Choice, Completion, TokenLogprob
from vllm_tasks.rows import Request

TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
THOUGHT = Completion((Choice("", reasoning="hm"),))
CALLED = Completion((Choice("", tool_calls=[TOOL_CALL]),))
TOKENS = [TokenLogprob("a", -1.0, [("a", -1.0), ("b", -2.0)]), TokenLogprob("!", -3.0, [])]


def kinds(kept: Kept) -> dict[str, str]:
    return {column.name: column.kind for column in kept.columns}


def test_nothing_is_kept_unless_asked_for() -> None:
    """Neither a column nor a part of the fingerprint."""
    plain = decoder()
    assert plain.kept.columns == ()
    assert plain.kept.rows(None, THOUGHT) == [{}]
    assert "keep" not in plain.identity()
    assert plain.identity() != decoder(keep=["usage"]).identity()


def test_each_name_is_a_typed_column() -> None:
    """The values of a choice, the request's text, and what the server counted."""
    names = ["reasoning", "tool_calls", "logprobs", "mean_logprob", "token_ids", "prompt", "usage"]
    kept = decoder(keep=names).kept
    assert kinds(kept) == {
        "_reasoning": "str",
        "_tool_calls": "json",
        "_logprobs": "json",
        "_mean_logprob": "float",
        "_token_ids": "json",
        "_prompt": "str",
        "_usage": "json",
    }
    choice = Choice("a!", "stop", [1, 2], TOKENS, "hm", [TOOL_CALL])
    (row,) = kept.rows(Request("P", {}), Completion((choice,), 3, 2, usage={"prompt_tokens": 3}))
    top = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]
    assert row == {
        "_reasoning": "hm",
        "_tool_calls": [TOOL_CALL],
        "_logprobs": [{"token": "a", "logprob": -1.0, "top": top}, {"token": "!", "logprob": -3.0}],
        "_mean_logprob": -2.0,
        "_token_ids": [1, 2],
        "_prompt": "P",
        "_usage": {"prompt_tokens": 3},
    }
    (missing,) = kept.rows(Request("P", {}), Completion((Choice("a"),)))
    assert {name for name, value in missing.items() if value is not None} == {"_prompt"}


def test_a_chat_is_kept_as_json() -> None:
    """Its text is that of the messages as they were sent."""
    chat = [{"role": "user", "content": "ä"}]
    (row,) = decoder(keep=["prompt"]).kept.rows(Request(chat, {}), THOUGHT)
    assert json.loads(row["_prompt"]) == chat
    assert "ä" in row["_prompt"]


def test_a_token_without_a_probability_does_not_spoil_the_mean() -> None:
    """The first token of an echoed prompt has none; JSON has no number for it."""
    tokens = [TokenLogprob("a", math.nan, []), TokenLogprob("b", -1.0, [("c", -math.inf)])]
    (row,) = decoder(keep=["logprobs", "mean_logprob"]).kept.rows(
        None, Completion((Choice("ab", logprobs=tokens),))
    )
    assert row["_mean_logprob"] == -1.0
    json.dumps(row["_logprobs"], allow_nan=False)


def test_several_choices_are_lists_or_rows() -> None:
    """As their answers are: a JSON list, or with flatten a row of each choice."""
    two = Completion((Choice("a", reasoning="x"), Choice("b")), usage={"prompt_tokens": 1})
    listed = decoder(many=True, keep=["reasoning", "usage"]).kept
    assert kinds(listed) == {"_reasoning": "json", "_usage": "json"}
    assert listed.rows(None, two) == [{"_reasoning": ["x", None], "_usage": {"prompt_tokens": 1}}]
    apart = decoder(many=True, flatten=True, keep=["reasoning", "usage"]).kept
    assert kinds(apart) == {"_reasoning": "str", "_usage": "json"}
    assert [row["_reasoning"] for row in apart.rows(None, two)] == ["x", None]


@pytest.mark.parametrize(
    ("answer", "keeps", "other"), [(THOUGHT, "reasoning", "tool_calls"), (CALLED, "tool_calls", "reasoning")]
)
def test_an_answer_without_a_text_is_an_output_where_it_is_kept(
    answer: Completion, keeps: Any, other: Any
) -> None:
    """It is NULL, whatever the type of answers is; where it would be lost, it is an error."""
    for made in (
        decoder(keep=[keeps]),
        decoder("int", keep=[keeps]),
        decoder(schema={"a": "int", "b": "str"}, keep=[keeps]),
    ):
        assert made.values(answer) is None
        assert made.rows(answer) == [(None,) * len(made.columns)]
    assert decoder("json", flatten=True, keep=[keeps]).rows(answer) == []
    assert decoder("int", many=True, keep=[keeps]).rows(answer) == [([None],)]
    for lost in (decoder(), decoder(keep=[other])):
        error = lost.rows(answer)
        assert isinstance(error, RowError)
        assert "has no text" in error.message


@pytest.mark.parametrize(
    ("choice", "usage", "why"),
    [
        (Choice("\n\n", reasoning="hm"), None, "has no text, only reasoning"),
        (Choice(" ", tool_calls=[TOOL_CALL]), None, "has no text, only reasoning or tool calls"),
        (Choice("", "tool_calls"), None, "does not return the tool calls"),
        (Choice("", "stop"), {"completion_tokens_details": {"reasoning_tokens": 7}}, "only 7 tokens of reas"),
    ],
)
def test_an_empty_answer_whose_tokens_went_elsewhere_is_an_error(
    choice: Choice, usage: dict[str, Any] | None, why: str
) -> None:
    """White space beside the reasoning is no text either, and a server may keep the reasoning to itself."""
    error = decoder().rows(Completion((choice,), usage=usage))
    assert isinstance(error, RowError)
    assert why in error.message


def test_a_model_may_answer_with_nothing() -> None:
    """An empty text that ended by itself is an answer, and so is white space."""
    for text in ("", " \n"):
        assert decoder().values(Completion((Choice(text, "stop"),), usage={"completion_tokens": 1})) == text


# ---------------------------------------------------------------------- what is requested


def sent(server: ScriptedServer, chat: bool, **fields: Any) -> dict[str, Any]:
    with VllmAPI(identifier="m", model="m", api_url=server.url, chat=chat, **fields) as model:
        model.predict("x")
    body: dict[str, Any] = server.posts[-1].body
    return body


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_kept_is_requested(server: ScriptedServer, chat: bool) -> None:
    """Log probabilities of the answer's tokens, and token ids; a number of the caller's is not changed."""
    body = sent(server, chat, keep=["logprobs", "token_ids"])
    assert body["return_token_ids"] is True
    assert (body["logprobs"], body.get("top_logprobs")) == ((True, 0) if chat else (0, None))
    body = sent(server, chat, keep=["mean_logprob"], predict_kwargs={"logprobs": 3})
    assert (body["logprobs"], body.get("top_logprobs")) == ((True, 3) if chat else (3, None))
    assert "return_token_ids" not in body


def test_the_chats_own_parameter_is_not_changed(server: ScriptedServer) -> None:
    """`top_logprobs` needs `logprobs=True`."""
    body = sent(server, True, keep=["logprobs"], predict_kwargs={"top_logprobs": 2})
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


def test_what_cannot_be_kept_is_refused(server: ScriptedServer) -> None:
    """/generate carries texts alone; a column is named once, by a known name."""
    with (
        VllmAPI(identifier="m", api_url=f"{server.url}/generate", keep=["prompt", "reasoning"]) as model,
        pytest.raises(InvalidCall, match=re.escape("keep=['reasoning'] is not in the answers of /generate")),
    ):
        model.predict("x")
    with pytest.raises(ValidationError, match="twice"):
        VllmAPI(identifier="m", keep=["usage", "usage"])
    with pytest.raises(ValidationError, match="mean_logprob"):
        VllmAPI(identifier="m", keep=["thoughts"])  # type: ignore[list-item]


@pytest.mark.engine
def test_the_engine_sends_what_is_kept(local_model: VllmModel) -> None:
    """Real vLLM: each token of the answer has an id and a log probability, whose mean is the confidence."""
    fields = {name: getattr(local_model, name) for name in ("model_name", "vllm_kwargs", "predict_kwargs")}
    model = VllmModel(identifier="kept", keep=["logprobs", "mean_logprob", "token_ids", "usage"], **fields)
    call = model.prepare(model.predict)
    (request,) = call.requests(["one two"])
    (answer,) = call.answers([request])
    assert isinstance(answer, Completion)
    (row,) = call.decoder.kept.rows(None, answer)
    tokens = row["_logprobs"]
    assert len(tokens) == len(row["_token_ids"]) == answer.completion_tokens == 8
    assert row["_mean_logprob"] == pytest.approx(sum(t["logprob"] for t in tokens) / 8)
    assert row["_mean_logprob"] < 0
    assert row["_usage"]["completion_tokens"] == 8
