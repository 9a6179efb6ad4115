"""Columns beside the answer in tables of each kind of store."""

from __future__ import annotations

import json

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from tests.tables.runs import ask, changed
from vllm_tasks import VllmAPI

TOOL_CALL = {"type": "function", "function": {"name": "look up", "arguments": "{}"}}
MESSAGES = {
    "both": {"content": "yes", "reasoning": "I think so"},
    "thought": {"content": None, "reasoning": "I only think"},
    "called": {"content": None, "tool_calls": [TOOL_CALL]},
}


def thinking(asked: Asked) -> Reply | None:
    """A chat model that reasons and calls tools."""
    if not asked.path.endswith("/chat/completions"):
        return None
    reply = usual(asked)
    for choice in reply.body["choices"]:
        choice["message"] = MESSAGES.get(asked.prompt, {"content": "[]"})
        choice["logprobs"] = {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": []}]}
        choice["token_ids"] = [7]
    return reply


def test_kept_columns_are_typed(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """They follow the answer; an answer that is only reasoning or only tool calls is an output."""
    place.fill_texts("both", "thought", "called")
    server.script = thinking
    keep = ["reasoning", "tool_calls", "logprobs", "mean_logprob", "token_ids", "prompt", "usage"]
    report = ask(changed(model, chat=True, keep=keep))
    assert (report.succeeded, report.failed) == (3, 0)
    both, thought, called = place.outputs()
    assert list(both)[:4] == ["id", "output", "_reasoning", "_tool_calls"]
    assert (both["output"], both["_reasoning"], both["_tool_calls"]) == ("yes", "I think so", None)
    assert both["_mean_logprob"] == -0.5
    assert json.loads(both["_logprobs"]) == [{"token": "yes", "logprob": -0.5}]
    assert json.loads(both["_token_ids"]) == [7]
    assert json.loads(both["_prompt"]) == [{"role": "user", "content": "both"}]
    assert json.loads(both["_usage"]) == {"prompt_tokens": 3, "completion_tokens": 5}
    assert (thought["output"], thought["_reasoning"], thought["_error"]) == (None, "I only think", None)
    assert (called["output"], json.loads(called["_tool_calls"])) == (None, [TOOL_CALL])


def test_a_text_prompt_is_kept_as_it_was_sent(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A failed row has NULL beside its error."""
    place.fill_texts("a", "b")
    server.script = lambda asked: Reply(status=400) if asked.prompt == "Say b" else None
    ask(changed(model, prompt="Say {input}", keep=["prompt"]))
    good, bad = place.outputs()
    assert (good["_prompt"], bad["_prompt"]) == ("Say a", None)
    assert bad["_error"].startswith("refused")


@pytest.mark.parametrize("n", [1, 2])
def test_rows_of_one_answer_share_what_is_kept(
    model: VllmAPI, place: Place, server: ScriptedServer, n: int
) -> None:
    """The items of a list, and an empty list; with n > 1 each choice has its own."""
    place.fill_texts("list", "empty")

    def listing(asked: Asked) -> Reply | None:
        if "messages" not in (asked.body or {}):
            return None
        reply = usual(asked)
        for i, choice in enumerate(reply.body["choices"]):
            text = '["p", "q"]' if asked.prompt == "list" else "[]"
            choice["message"] = {"content": text, "reasoning": f"thought {i}"}
        return reply

    server.script = listing
    ask(changed(model, chat=True, datatype="json", flatten=True, keep=["reasoning"]), n=n)
    found = [(row["id"], row["_position"], row["_reasoning"]) for row in place.outputs()]
    if n == 1:
        assert found == [(0, 0, "thought 0"), (0, 1, "thought 0"), (1, None, "thought 0")]
    else:
        assert found == [(i, position, f"thought {position}") for i in (0, 1) for position in (0, 1)]


def test_what_is_kept_counts(model: VllmAPI, place: Place) -> None:
    """Another choice of columns is another fingerprint, so no row has half of them."""
    place.fill_texts("a")
    plain, kept = ask(model), changed(model, keep=["usage"])
    assert ask(kept, predict_id="other").fingerprint != plain.fingerprint
    assert ask(kept, predict_id="other").processed == 0
