"""Answers that are lists, several or truncated, and what does not go together."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from tests.calls.decoding import (
    INT_AND_TEXT,
    answer,
    as_date,
    columns,
    decoder,
    iso,
    packed,
    refused,
    refused_row,
    words,
)
from tests.calls.people import PERSON, PERSON_COLUMNS
from vllm_tasks import DataType, InvalidCall, RowError

pytestmark = pytest.mark.usefixtures("own_modules")


# ---------------------------------------------------------------------- flatten


def test_lists_become_rows() -> None:
    """One row an item, none for an empty list; predict gives the list."""
    made = decoder("json", flatten=True)
    assert columns(made) == {"output": "json"}
    assert made.rows(answer('[1, "a", null, [2, 3]]')) == [(1,), ("a",), (None,), ([2, 3],)]
    assert made.rows(answer("[]")) == []
    assert made.values(answer('[1, "a"]')) == [1, "a"]


@pytest.mark.parametrize("text", ['{"a": 1}', "1", "null", '"[]"'])
def test_what_is_no_list_cannot_be_flattened(text: str) -> None:
    """predict returns it as a value; in a table it is an error of the row with the raw text."""
    message = refused_row(decoder("json", flatten=True), text)
    assert "not the list that flatten needs" in message
    assert message.endswith(text)


def test_lists_of_objects_become_rows_of_columns() -> None:
    """Columns, a pydantic model and the items of a JSON Schema's array each describe one row."""
    by_columns = decoder(schema={"a": "int", "b": "str"}, flatten=True)
    assert by_columns.schema is not None
    assert by_columns.schema["type"] == "array"
    assert by_columns.schema["items"]["required"] == ["a", "b"]
    by_schema = decoder(schema={"type": "array", "items": INT_AND_TEXT}, flatten=True)
    for made in (by_columns, by_schema):
        assert columns(made) == {"a": "int", "b": "str"}
        assert made.rows(answer('[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]')) == [(1, "x"), (2, "y")]
        assert made.rows(answer("[]")) == []
        assert "$[1].a" in refused(made, '[{"a": 1, "b": "x"}, {"a": "2", "b": "y"}]')
    for path in (PERSON, "tests.calls.people.People"):
        made = decoder(schema=path, flatten=True)
        assert columns(made) == PERSON_COLUMNS
        assert made.schema is not None
        assert made.schema["type"] == "array"
        (row,) = made.rows(answer('[{"name": "a", "age": 1}]'))  # type: ignore[misc]
        assert row[:2] == ("a", 1)
        assert "[0]['age']" in refused(made, '[{"name": "a", "age": -1}]')


def test_lists_of_scalars_become_rows_of_their_type() -> None:
    """The one column has the type of the items."""
    made = decoder(schema={"type": "array", "items": {"type": "integer"}}, flatten=True)
    assert columns(made) == {"output": "int"}
    assert made.rows(answer("[1, 2.0]")) == [(1,), (2,)]


# ---------------------------------------------------------------------- n > 1


def test_several_choices_are_a_list() -> None:
    """predict gives the list of values, the table keeps it as JSON in one column."""
    ints = decoder("int", many=True)
    assert columns(ints) == {"output": "json"}
    assert ints.values(answer("1", "2")) == [1, 2]
    assert ints.rows(answer("1", "2")) == [([1, 2],)]
    assert decoder(many=True).rows(answer("a", "b")) == [(["a", "b"],)]
    objects = decoder(schema={"a": "int"}, many=True)
    assert columns(objects) == {"output": "json"}
    assert objects.rows(answer('{"a": 1}', '{"a": 2}')) == [([{"a": 1}, {"a": 2}],)]
    dates = decoder(DataType(identifier="d", decoder=as_date, encoder=iso), many=True)
    assert dates.rows(answer("2024-01-01 ", "2024-01-02")) == [(["2024-01-01", "2024-01-02"],)]


def test_one_bad_choice_fails_the_row() -> None:
    """The error has the text of that choice."""
    assert refused(decoder("int", many=True), "1", "two").endswith(": two")


def test_several_choices_flattened_are_a_row_each() -> None:
    """The choices are the list, and a list in one of them stays a list: one level only."""
    assert decoder("int", many=True, flatten=True).rows(answer("1", "2")) == [(1,), (2,)]
    assert decoder("json", many=True, flatten=True).rows(answer("[1, 2]", "[]")) == [([1, 2],), ([],)]
    assert decoder("bytes", many=True, flatten=True).rows(answer("a", "b")) == [(b"a",), (b"b",)]
    objects = decoder(schema={"a": "int", "b": "str"}, many=True, flatten=True)
    assert objects.schema is not None
    assert objects.schema["type"] == "object"
    assert objects.rows(answer('{"a": 1, "b": "x"}', '{"a": 2, "b": "y"}')) == [(1, "x"), (2, "y")]


# ---------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"datatype": "str", "flatten": True}, "datatype='str' are not lists: use datatype='json'"),
        ({"flatten": True}, "flatten makes rows of lists"),
        ({"datatype": DataType(identifier="d"), "flatten": True}, "datatype='d' are not lists"),
        ({"schema": INT_AND_TEXT, "flatten": True}, "write the JSON Schema of the list"),
        ({"datatype": "bytes", "many": True}, "use flatten=True"),
        ({"datatype": DataType(identifier="d", encoder=packed), "many": True}, "datatype='d' gives bytes"),
        ({"datatype": "int", "schema": {"a": "int"}}, "datatype='int' and output_schema"),
        (
            {
                "schema": {"type": "array", "items": {**INT_AND_TEXT, "properties": {"_": {}}}},
                "flatten": True,
            },
            "'_', which cannot be a column",
        ),
        ({"on_length": "ignore"}, "neither 'keep' nor 'error'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_way_out(arguments: dict[str, Any], said: str) -> None:
    """The error comes before any row is sent."""
    with pytest.raises(InvalidCall, match=re.escape(said)):
        decoder(**arguments)


# ---------------------------------------------------------------------- cut answers


def test_cut_answers_are_kept_unless_told_otherwise() -> None:
    """With on_length='error' a truncated answer is an error with its text; predict still returns it."""
    cut = answer("a", finish_reason="length")
    assert decoder().rows(cut) == [("a",)]
    strict = decoder(on_length="error")
    error = strict.rows(cut)
    assert isinstance(error, RowError)
    assert (
        error.message
        == "the answer was truncated at max_tokens and is refused because of on_length='error': a"
    )
    assert strict.values(cut) == "a"
    assert strict.rows(answer("a")) == [("a",)]


def test_a_cut_answer_that_does_not_parse_says_that_it_was_cut() -> None:
    """The way out, more tokens, is in the message."""
    error = decoder("json").rows(answer('{"a": ', finish_reason="length"))
    assert isinstance(error, RowError)
    assert error.message.startswith("the answer was truncated at max_tokens and is not JSON")


# ---------------------------------------------------------------------- identity


def test_identity_is_json_and_differs_where_answers_may() -> None:
    """The identity is the types' part of the fingerprint: equal for equal fields, different for others."""
    options: list[dict[str, Any]] = [
        {},
        {"datatype": "json"},
        {"datatype": "json", "flatten": True},
        {"on_length": "error"},
        {"datatype": DataType(identifier="d", decoder=as_date)},
        {"datatype": DataType(identifier="d", decoder=words)},
        {"datatype": DataType(identifier="d", decoder=words, encoder=functools.partial(str.replace))},
        {"schema": {"a": "int"}},
        {"schema": {"a": "bytes"}},
        {"schema": {"a": "str"}},
        {"schema": INT_AND_TEXT},
        {"schema": PERSON},
        {"schema": "tests.calls.people.People"},
    ]
    told = [json.dumps(decoder(**option).identity()) for option in options]
    assert told == [json.dumps(decoder(**option).identity()) for option in options]
    assert len(set(told)) == len(options)
