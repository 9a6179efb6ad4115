"""The tasks that return numbers: values, requests, and what is refused beside them."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest

from tests.servers.scripted_server import Reply, ScriptedServer, usual, vector_of
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.calls.sampling import known_names
from vllm_tasks.engines.local.python import source_of_vllm
from vllm_tasks.errors import RowErrors


def model_of(server: ScriptedServer, **fields: Any) -> VllmAPI:
    return VllmAPI(**{"identifier": "m", "api_url": server.url, "retries": 0, **fields})


def test_an_embedding_is_a_list_of_numbers(server: ScriptedServer) -> None:
    """Texts are sent as they are, also by a model that has a chat template; equal ones are sent once."""
    server.tokenizes = Reply({"count": 3})
    with model_of(server, task="embed", predict_kwargs={"truncate_prompt_tokens": -1}) as model:
        assert model.predict("a") == vector_of("a")
        assert model.predict_batches(["a", "b", "b"]) == [vector_of("a"), vector_of("b"), vector_of("b")]
        (completion,) = model.completions(["a"], dimensions=8)
    assert completion.choices[0].data == vector_of("a", 8)  # type: ignore[union-attr]
    bodies = [post.body for post in server.posts]
    assert len(bodies) == 4
    assert bodies[0] == {
        "model": "scripted-model", "input": "a", "encoding_format": "base64", "truncate_prompt_tokens": -1,
    }  # fmt: skip
    assert {post.path for post in server.posts} == {"/v1/embeddings"}


def test_messages_have_an_embedding(server: ScriptedServer) -> None:
    """With chat, the template decides what is embedded."""
    with model_of(server, task="embed", chat=True, system="Represent the query:") as model:
        assert model.predict("a", add_generation_prompt=True) == vector_of("a")
    assert [m["role"] for m in server.posts[0].body["messages"]] == ["system", "user"]


def test_a_score_is_of_a_pair(server: ScriptedServer) -> None:
    """The pair is a tuple, a dict, or what a prompt function returns."""
    with model_of(server, task="score", signature="*args") as model:
        assert model.predict_batches([("why", "a"), ("how", "bc")]) == [3 / 8 + 1, 3 / 8 + 2]
        (wrong,) = model.predict_batches([("why", 5)], on_error="return")
    assert wrong.message == "task='score' takes two texts, a query and a document, got a str, a int"
    with model_of(server, task="score", signature="**kwargs") as model:
        assert model.predict({"query": "why", "document": "a"}) == 3 / 8 + 1
    with model_of(server, task="score", prompt_func=lambda x, query: (query, x)) as model:
        assert model.predict("a", query="why") == 3 / 8 + 1


def test_a_class_has_a_probability(server: ScriptedServer) -> None:
    """The label is the model's; a model without names of classes has their numbers."""
    with model_of(server, task="classify") as model:
        value = model.predict("a")
        assert value["probabilities"][["bug", "feature", "question"].index(value["label"])] == 0.625
        server.script = lambda asked: _changed(asked, {"label": None, "probs": [0.25, 0.75]})
        assert model.predict("a") == {"label": "1", "probability": 0.75, "probabilities": [0.25, 0.75]}


@pytest.mark.parametrize(
    ("task", "item"),
    [
        ("embed", {"embedding": "no base64!"}),
        ("embed", {"embedding": base64.b64encode(b"three").decode()}),
        ("embed", {"embedding": base64.b64encode(struct.pack("<f", math.nan)).decode()}),
        ("embed", {"embedding": [1, None]}),
        ("embed", {"embedding": [1e300]}),
        ("embed", {"embedding": []}),
        ("embed", {"embedding": {"a": 1}}),
        ("embed", {}),
        ("classify", {"label": "a", "probs": "high"}),
        ("classify", {"label": "a", "probs": [True]}),
        ("classify", {"label": 5, "probs": [0.5]}),
        ("classify", {"label": "a", "probs": [3.5, -1.5]}),
        ("reward", {"label": "a", "probs": [0.5, 0.5]}),
    ],
)
def test_what_is_no_answer_is_an_error_of_the_row(
    server: ScriptedServer, task: Any, item: dict[str, Any]
) -> None:
    """It names what was expected."""
    server.script = lambda asked: asked.body and Reply({**usual(asked).body, "data": [item]})
    with model_of(server, task=task, chat=False) as model:
        (error,) = model.predict_batches(["a"], on_error="return")
    assert isinstance(error, RowError)
    assert error.kind == "response"
    assert "expected" in error.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "embed", "output_schema": {"a": "str"}}, "output_schema constrains generated text"),
        ({"task": "classify", "datatype": "json"}, "datatype sets the type of generated text"),
        ({"task": "embed", "datatype": "json", "flatten": True}, "returns numbers: leave it out"),
        ({"task": "embed", "stream": True}, "stream receives generated text"),
        ({"task": "embed", "predict_kwargs": {"n": 2}}, "'n' is for generated text"),
        ({"task": "embed", "predict_kwargs": {"dimension": 2}}, "did you mean 'dimensions'"),
        ({"task": "embed", "predict_kwargs": {"normalize": True}}, "vLLM's name is use_activation"),
        ({"task": "classify", "predict_kwargs": {"use_activation": False}}, "task='reward' returns"),
        ({"task": "embed", "predict_kwargs": {"encoding_format": "float"}}, "numbers of 32 bits"),
        ({"task": "score", "signature": "*args", "predict_kwargs": {"dimensions": 2}}, "does not know"),
        ({"task": "embed", "api_url": "http://127.0.0.1:1/generate"}, "use the server's base URL"),
        ({"task": "score"}, "takes two columns"),
        ({"task": "score", "signature": "*args", "prompt": "{0}{1}"}, "leave out prompt"),
        ({"task": "score", "signature": "*args", "chat": True}, "leave out chat"),
        ({"task": "rank"}, "Input should be 'generate', 'embed', 'score', 'classify' or 'reward'"),
        ({"dimensions": 5}, "'dimensions' is a sampling parameter: put it into predict_kwargs"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    """When the model is made."""
    with pytest.raises(ValueError, match=r".") as refused:
        VllmAPI(**{"identifier": "m", "api_url": "http://127.0.0.1:1", **fields})
    assert words in str(refused.value)


def test_arguments_of_a_call_are_refused_too(server: ScriptedServer) -> None:
    """For a call, and for prompts of the other kind."""
    with model_of(server, task="embed") as model:
        with pytest.raises(InvalidCall, match="'temperature' is for generated text"):
            model.predict("a", temperature=0)
        with pytest.raises(InvalidCall, match="'chat_template' is for chat messages"):
            model.predict("a", chat_template="x")
        server.script = lambda asked: asked.body and Reply({"error": {"message": "no"}}, 400)
        with pytest.raises(RowErrors, match="refused"):
            model.predict("a")


def test_a_task_runs_vllm_as_a_pooling_model() -> None:
    """Unless the engine arguments say otherwise; `generate` is what no task is."""
    made = {
        task: VllmModel(identifier="m", model_name="x", task=task).engine_config().engine_args  # type: ignore[union-attr]
        for task in (None, "generate", "embed")
    }
    assert made[None] == made["generate"]
    assert '"runner": "pooling"' in made["embed"]
    assert "runner" not in made[None]


@pytest.mark.engine
def test_the_names_are_those_of_vllm() -> None:
    """Each name of the table is a field of vLLM's requests."""
    source = source_of_vllm("")
    assert source is not None
    files = (source / "entrypoints/pooling").rglob("protocol.py")
    text = "".join(file.read_text() for file in files)
    for task in ("embed", "score", "classify", "reward"):
        for name in known_names(task):
            assert f"    {name}: " in text, name


def _changed(asked: Any, item: dict[str, Any]) -> Reply | None:
    if asked.body is None:
        return None
    reply = usual(asked)
    reply.body["data"][0] |= item
    return reply
