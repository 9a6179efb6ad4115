"""Outputs of `predict_in_db`: their types, columns and rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, answer_to, usual
from tests.tables.runs import ask, changed, says
from vllm_tasks import DataType, VllmAPI


@pytest.mark.parametrize(
    ("datatype", "text", "value"),
    [("int", "42", 42), ("float", "0.5", 0.5), ("bool", "yes", True), ("bytes", "ab", b"ab")],
)
def test_outputs_have_the_type_asked_for(
    model: VllmAPI, place: Place, server: ScriptedServer, datatype: str, text: str, value: Any
) -> None:
    """A datatype makes a column of that type; an answer of another type is an error with the raw answer."""
    place.fill_texts("a", "b")
    server.script = says(lambda asked: text if asked.prompt == "a" else "☂")
    ask(changed(model, datatype=datatype), max_failed=None)
    good, bad = place.outputs()
    assert good["output"] == value
    assert type(good["output"]) is type(value)
    if datatype != "bytes":
        assert bad["output"] is None
        assert bad["_error"].startswith("output: ")
        assert "☂" in bad["_error"]


def test_a_schema_makes_typed_columns(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """Each property is a column, and vLLM gets the schema."""
    place.fill_texts("a")
    server.script = says(json.dumps({"name": "x", "age": 7, "tags": ["p", {"q": None}]}))
    ask(changed(model, output_schema={"name": "str", "age": "int", "tags": "json"}))
    (row,) = place.outputs()
    assert (row["name"], row["age"]) == ("x", 7)
    assert json.loads(row["tags"]) == ["p", {"q": None}]
    schema = server.posts[0].body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["name", "age", "tags"]


def test_flatten_makes_rows(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A list becomes numbered rows, an empty one a row with NULL; a redone row takes all of them along."""
    place.fill_texts("two", "none", "bad")
    answers = {"two": '["p", "q"]', "none": "[]", "bad": "{}"}
    server.script = says(lambda asked: answers[asked.prompt])
    flat = changed(model, datatype="json", flatten=True)
    ask(flat)
    rows = [(r["id"], r["_position"], r["output"] and json.loads(r["output"])) for r in place.outputs()]
    assert rows == [(0, 0, "p"), (0, 1, "q"), (1, None, None), (2, None, None)]
    assert place.outputs()[3]["_error"].startswith("output: ")
    assert ask(flat).processed == 0
    answers["two"] = '["r"]'
    ask(flat, overwrite=True)
    rows = [(r["id"], r["_position"]) for r in place.outputs()]
    assert rows == [(0, 0), (1, None), (2, None)]


def test_several_choices_are_a_list(model: VllmAPI, place: Place) -> None:
    """With n=2 an output is a list of two."""
    place.fill_texts("a")
    ask(model, n=2)
    assert json.loads(place.answers()[0]) == [answer_to("a")] * 2


def test_cut_answers_can_be_errors(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """`finish_reason` is kept, and `on_length="error"` makes an error of "length"."""

    def cut(asked: Asked) -> Reply | None:
        reply = usual(asked)
        if "choices" in reply.body:
            reply.body["choices"][0]["finish_reason"] = "length"
        return reply

    place.fill_texts("a")
    server.script = cut
    report = ask(model, max_tokens=5)
    assert place.outputs()[0]["_finish_reason"] == "length"
    assert (report.truncated, report.failed) == (1, 0)
    report = ask(changed(model, model_update_kwargs={"on_length": "error"}), max_tokens=5)
    assert (report.truncated, report.failed) == (1, 1)
    assert "max_tokens" in place.outputs()[0]["_error"]


def as_upper(text: str) -> str:
    return text.upper()


def as_utf16(value: str) -> bytes:
    return value.encode("utf-16-le")


def test_own_types_decode_and_encode(model: VllmAPI, place: Place) -> None:
    """An own type's decoder reads the answer, its encoder makes what is stored."""
    place.fill_texts("a")
    own = DataType(identifier="own", decoder=as_upper, encoder=as_utf16)
    ask(changed(model, datatype=own))
    assert place.answers()[0] == answer_to("a").upper().encode("utf-16-le")


def test_what_a_database_cannot_hold_is_an_error_of_its_row(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """A NUL character, which PostgreSQL refuses, fails no other row."""
    place.fill_texts("a", "b", "c")
    server.script = says(lambda asked: "x\0y" if asked.prompt == "b" else "fine")
    ask(model)
    a, b, c = place.outputs()
    assert (a["output"], c["output"]) == ("fine", "fine")
    assert b["output"] == "x\0y" or b["_error"].startswith("output: ")
