"""Typed outputs of models: over HTTP, and from the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.calls.decoding import decoder
from tests.servers.scripted_server import Asked, Reply, ScriptedServer
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Completion

pytestmark = pytest.mark.usefixtures("own_modules")


# ---------------------------------------------------------------------- over the wire


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(echo) as server:
        yield server


def echo(asked: Asked) -> Reply | None:
    """Answers with the prompt."""
    if asked.body is None:
        return None
    texts = [asked.prompt] * (asked.body.get("n") or 1)
    if asked.path == "/generate":
        return Reply({"text": [asked.prompt + t for t in texts]})
    key = "text" if asked.path == "/v1/completions" else "message"
    choices = [{"index": i, key: t if key == "text" else {"content": t}} for i, t in enumerate(texts)]
    return Reply({"model": "m", "choices": choices})


def api(server: ScriptedServer, path: str = "", **fields: Any) -> VllmAPI:
    return VllmAPI(identifier="m", model="m", api_url=server.url + path, retries=0, **fields)


@pytest.mark.parametrize(
    ("path", "chat"), [("", False), ("", True), ("/v1/completions", False), ("/v1/chat/completions", True)]
)
def test_a_schema_is_asked_of_vllm_and_checked(server: ScriptedServer, path: str, chat: bool) -> None:
    """The schema is sent as `response_format`; a bad answer is an error of its row with the raw text."""
    with api(server, path, chat=chat, output_schema={"a": "int"}) as model:
        good, bad = model.predict_batches(['{"a": 1}', '{"a": 1.5}'], on_error="return")
        with pytest.raises(RowErrors, match=r"row 0: output: .* does not fit the schema at \$\.a"):
            model.predict('{"a": "x"}')
    assert good == {"a": 1}
    assert isinstance(bad, RowError)
    assert (bad.kind, bad.index, bad.retryable) == ("output", 1, False)
    assert bad.message.endswith('{"a": 1.5}')
    schema = decoder(schema={"a": "int"}).schema
    sent = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert all(asked.body["response_format"] == sent for asked in server.posts)


def test_the_legacy_server_is_not_asked_for_a_schema_but_checked(server: ScriptedServer) -> None:
    """The servers of `/generate` cannot take one as JSON."""
    with api(server, "/generate", output_schema={"a": "int"}) as model:
        assert model.predict('{"a": 1}') == {"a": 1}
        with pytest.raises(RowErrors, match="is not JSON"):
            model.predict("no")
    assert not any("response_format" in asked.body for asked in server.posts)


@pytest.mark.parametrize(
    "own",
    [
        {"structured_outputs": {"regex": ".*"}},
        {"structured_outputs": None},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_the_caller_asks_of_vllm_himself_is_kept(server: ScriptedServer, own: dict[str, Any]) -> None:
    """The user's structured_outputs or response_format are sent unchanged; the answer is still checked."""
    with api(server, output_schema={"a": "int"}, predict_kwargs=own) as model:
        assert model.predict('{"a": 1}') == {"a": 1}
        with pytest.raises(RowErrors):
            model.predict("{}")
    for asked in server.posts:
        sent = {k: asked.body[k] for k in ("structured_outputs", "response_format") if k in asked.body}
        assert sent == own


def test_predict_gives_typed_values_and_completions_raw_ones(server: ScriptedServer) -> None:
    """`n` at call time gives lists; full results keep the text."""
    with api(server, datatype="int") as model:
        assert model.predict("1") == 1
        assert model.predict_batches(["1", "2"], n=2) == [[1, 1], [2, 2]]
        (full,) = model.completions(["no number"])
        assert isinstance(full, Completion)
        assert full.text == "no number"


def test_what_makes_no_sense_is_refused_before_anything_is_asked(server: ScriptedServer) -> None:
    """An `n` that only the call gives is checked, too."""
    with api(server, datatype="bytes") as model:
        with pytest.raises(InvalidCall, match="use flatten=True"):
            model.predict("x", n=2)
        assert model.predict("x") == b"x"
    with api(server, flatten=True) as model:
        with pytest.raises(InvalidCall, match="flatten"):
            model.predict("x")
        assert model.predict("x", n=2) == ["x", "x"]
    assert len(server.posts) == 2


# ---------------------------------------------------------------------- the real engine


@pytest.mark.engine
def test_the_engine_answers_in_the_schema(local_model: VllmModel) -> None:
    """Real vLLM keeps to the schema of each form, so that even a model without sense gives typed values."""
    word = {"enum": ["red", "green"], "type": "string"}
    schema = {
        "type": "object",
        "properties": {"colour": {"$ref": "#/$defs/Word"}, "ok": {"type": "boolean"}},
        "required": ["colour", "ok"],
        "additionalProperties": False,
        "$defs": {"Word": word},
    }
    prompts = ["a", "b", "c"]
    for given_schema in (schema, "tests.calls.people.Verdict"):
        model = local_model.model_copy(update={"output_schema": given_schema})
        for value in model.predict_batches(prompts, max_tokens=200):
            assert value["colour"] in ("red", "green")
            assert isinstance(value["ok"], bool)


@pytest.mark.engine
def test_the_engine_answers_in_columns_and_says_what_was_cut(local_model: VllmModel) -> None:
    """A schema gives columns, or a list with flatten; an answer truncated at max_tokens is an error."""
    model = local_model.model_copy(update={"output_schema": {"good": "bool", "bad": "bool"}, "chat": False})
    value = model.predict("a", max_tokens=100)
    assert {type(v) for v in value.values()} == {bool}
    with pytest.raises(RowErrors, match="was truncated at max_tokens and is not JSON"):
        model.predict("a", max_tokens=2)
    listed = model.model_copy(update={"flatten": True})
    values = listed.predict_batches(["a"], on_error="return", max_tokens=200)
    assert isinstance(values[0], list | RowError)
