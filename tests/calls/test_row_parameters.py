"""Parameters of a row's own: what they become, which are refused, and which rows share them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers.scripted_server import NO_TEMPLATE, Reply, ScriptedServer, refused
from vllm_tasks import Request, RowError, VllmAPI, VllmModel
from vllm_tasks.calls.call import Call
from vllm_tasks.calls.row_parameters import plain_number
from vllm_tasks.engines.batching import fold
from vllm_tasks.placement.requests import _as_data

CALLS = {"temperature": 0, "max_tokens": 9}
OWN = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 3),
        "temperature": st.sampled_from([0, 1]),
        "stop": st.just(["."]),
    },
)


def own_request(row: dict[str, Any]) -> Any:
    return row["own"]


def call_of(model: VllmAPI | VllmModel, **sampling: Any) -> Call:
    return model.prepare(model.predict, None, sampling)


def calling(**fields: Any) -> VllmAPI:
    """A model whose records are the requests themselves."""
    return VllmAPI(
        identifier="m",
        api_url="http://127.0.0.1:1",
        prompt_func=own_request,
        **{"chat": False, **fields},
    )


def message(model: VllmAPI | VllmModel, own: Request) -> str:
    (found,) = call_of(model).requests([{"own": own}])
    assert isinstance(found, RowError)
    assert found.kind == "prompt"
    return found.message


@given(st.lists(st.tuples(st.sampled_from("ab"), OWN)))
def test_rows_with_equal_parameters_share_them_and_fold(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """A row's own override the call's; equal ones are one object, and only equal rows are sent once."""
    made = call_of(calling(predict_kwargs=CALLS)).requests([{"own": Request(p, own)} for p, own in rows])
    requests = [request for request in made if isinstance(request, Request)]
    merged = [{**CALLS, **own} for _, own in rows]
    assert [dict(request.sampling) for request in requests] == merged
    distinct = {id(request.sampling) for request in requests}
    assert len(distinct) == len({str(sorted(each.items())) for each in merged})
    folded = fold(made)
    assert sorted(i for _, positions in folded for i in positions) == list(range(len(rows)))
    for request, positions in folded:
        assert {(requests[i].prompt, id(requests[i].sampling)) for i in positions} == {
            (request.prompt, id(request.sampling))
        }
    greedy = {
        (p, str(sorted(m.items()))) for (p, _), m in zip(rows, merged, strict=True) if not m["temperature"]
    }
    assert len(folded) == len(greedy) + sum(1 for m in merged if m["temperature"])


@given(st.lists(st.tuples(st.sampled_from("ab"), OWN)))
def test_what_goes_to_a_pool_has_each_rows_parameters(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """The sets travel once each, that of the call first."""
    call = call_of(calling(predict_kwargs=CALLS))
    requests = [
        r for r in call.requests([{"own": Request(p, own)} for p, own in rows]) if isinstance(r, Request)
    ]
    data = _as_data(requests, call.sampling)
    assert data["parameters"][0] == CALLS
    assert data["prompts"] == [prompt for prompt, _ in rows]
    assert [data["parameters"][i] for i in data["of"]] == [{**CALLS, **own} for _, own in rows]
    assert len(data["parameters"]) <= 1 + len({str(sorted(own.items())) for _, own in rows})


def test_each_row_is_sent_with_its_own(server: ScriptedServer) -> None:
    """Bodies have the row's parameters, model and schema; an equal greedy row is sent once."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}

    def with_budget(text: str) -> Any:
        if text == "plain":
            return text
        if text == "schema":
            return Request(text, output_schema=schema)
        return Request(text, {"max_tokens": len(text)}, model="other" if text == "elsewhere" else None)

    with VllmAPI(
        identifier="m", api_url=server.url, prompt_func=with_budget, datatype="json", predict_kwargs=CALLS
    ) as model:
        answers = model.completions(["a", "bcd", "plain", "bcd", "elsewhere", "schema"])
    assert [answer.text for answer in answers if not isinstance(answer, RowError)][1] == " bcd!"
    bodies = {post.prompt: post.body for post in server.posts}
    assert len(server.posts) == len(bodies) == 5
    assert {text: body["max_tokens"] for text, body in bodies.items()} == {
        "a": 1, "bcd": 3, "plain": 9, "elsewhere": 9, "schema": 9,
    }  # fmt: skip
    assert {text for text, body in bodies.items() if body["model"] == "other"} == {"elsewhere"}
    sent = bodies["schema"]["response_format"]["json_schema"]["schema"]
    assert sent["properties"] == schema["properties"]
    assert "response_format" not in bodies["plain"]


def test_a_text_that_is_refused_as_chat_keeps_its_own(server: ScriptedServer) -> None:
    """Where no server reports a chat template, the text that is sent in place of the chat has them too."""
    server.tokenizes = Reply(status=404)
    server.script = lambda asked: refused(400, NO_TEMPLATE) if "chat" in asked.path else None
    with VllmAPI(
        identifier="m", api_url=server.url, prompt_func=lambda x: Request(x, {"max_tokens": len(x)})
    ) as model:
        assert model.predict_batches(["a", "bb"]) == [" a!", " bb!"]
    sent = {post.body["prompt"]: post.body["max_tokens"] for post in server.posts if "chat" not in post.path}
    assert sent == {"a": 1, "bb": 2}


def test_an_unknown_model_is_the_error_of_its_rows(server: ScriptedServer) -> None:
    """A name that a row gives and the server does not know fails the row alone, whenever it comes."""
    server.script = lambda asked: (
        refused(404, "The model `nobody` does not exist.")
        if asked.body and asked.body["model"] == "nobody"
        else None
    )
    names = {"a": None, "b": "nobody"}
    with VllmAPI(
        identifier="m", api_url=server.url, prompt_func=lambda x: Request(x, model=names[x]), retries=0
    ) as model:
        (alone,) = model.predict_batches(["b"], on_error="return")
        both = model.predict_batches(["b", "a"], on_error="return")
    assert isinstance(alone, RowError)
    assert alone.kind == "refused"
    assert [isinstance(answer, RowError) for answer in both] == [True, False]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Request("x", {"max_token": 5}), "did you mean 'max_tokens'?"),
        (Request("x", {"model": "other"}), "'model' cannot be set"),
        (Request("x", {"n": 2}), "n is the same for all rows"),
        (Request("x", {"stop": object()}), "not JSON serializable"),
        (Request("x", {"temperature": float("nan")}), "not JSON compliant"),
        (Request("x", [("n", 2)]), "sampling must be a mapping"),  # type: ignore[arg-type]
        (Request("x", {"add_generation_prompt": True}), "is for chat messages, and the prompts are texts"),
        (Request("x", output_schema={"a": "str"}), "needs a model with datatype='json'"),
        (Request("x", lora="a", model="b"), "lora='a' and model='b' both say what answers"),
        (Request("x", lora={"lora_path": "a"}), "knows adapters and models by a name"),
        (Request(["x"]), "expected a text, a list of chat messages or token ids, got a list"),  # type: ignore[list-item]
    ],
)
def test_what_cannot_be_sent_is_an_error_of_the_row(own: Request, words: str) -> None:
    """The reason names the parameter and the way out; other rows are not affected."""
    assert words in message(calling(), own)


def test_a_schema_and_a_format_exclude_each_other() -> None:
    """A row's own schema needs a column of any JSON; with a format of its own beside it, it is refused."""
    model = calling(datatype="json")
    both = Request("x", {"structured_outputs": {"regex": "a"}}, output_schema={"a": "str"})
    assert "output_schema and structured_outputs both set the format" in message(model, both)
    assert "neither columns" in message(model, Request("x", output_schema={"a": "text"}))
    listed: Any = [{"a": "str"}]
    assert "neither a dict nor a text" in message(model, Request("x", output_schema=listed))


def test_a_local_engine_takes_adapters_and_no_other_model() -> None:
    """An adapter needs a name and a folder."""
    model = VllmModel(identifier="m", model_name="/nowhere", chat=False, prompt_func=own_request)
    assert "the local engine has one model and its adapters" in message(model, Request("x", model="other"))
    assert "the local engine has one model and its adapters" in message(model, Request("x", lora="other"))
    adapter = {"lora_name": "a", "lora_path": "/adapters/a"}
    (made,) = call_of(model).requests([{"own": Request("x", lora=adapter)}])
    assert made == Request("x", {"lora_request": adapter}, lora=adapter)


def test_a_rows_own_replaces_what_it_excludes() -> None:
    """The call's other name of the same limit, or its format, would win on the server."""
    limits = {"max_completion_tokens": 50, "response_format": {"type": "text"}}
    model = calling(chat=True, predict_kwargs=limits)
    own = Request("x", {"max_tokens": 2, "structured_outputs": {"choice": ["a"]}})
    (made,) = call_of(model).requests([{"own": own}])
    assert isinstance(made, Request)
    assert made.sampling == {"max_tokens": 2, "structured_outputs": {"choice": ["a"]}}


def test_an_n_that_is_the_calls_is_accepted() -> None:
    """A batch file says it for each row."""
    (made,) = call_of(calling(), n=2).requests([{"own": Request("x", {"n": 2})}])
    assert isinstance(made, Request)
    assert made.sampling == {"n": 2}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(Decimal("5"), 5), (Decimal("5.00"), 5), (Decimal("0.25"), 0.25), (7, 7), (["a"], ["a"]), ("5", "5")],
)
def test_numeric_columns_give_numbers(value: Any, expected: Any) -> None:
    """A server takes no Decimal."""
    found = plain_number(value)
    assert (found, type(found)) == (expected, type(expected))
