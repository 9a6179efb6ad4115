"""Answers with a schema: named columns, JSON Schema, pydantic."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calls.decoding import INT_AND_TEXT, answer, columns, decoder, refused, refused_row
from tests.calls.people import PERSON, PERSON_COLUMNS, Person
from vllm_tasks import RowError

pytestmark = pytest.mark.usefixtures("own_modules")


# ---------------------------------------------------------------------- schemas of columns


def test_named_columns_are_asked_as_an_object_and_kept_typed() -> None:
    """A mapping of names to types is a closed JSON object to vLLM and typed columns in the table."""
    kinds = {"s": "str", "i": "int", "f": "float", "b": "bool", "j": "json", "y": "bytes", "type": "str"}
    made = decoder(schema=kinds)
    assert columns(made) == kinds
    assert made.schema == {
        "type": "object",
        "properties": {
            "s": {"type": "string"},
            "i": {"type": "integer"},
            "f": {"type": "number"},
            "b": {"type": "boolean"},
            "j": {},
            "y": {"type": "string"},
            "type": {"type": "string"},
        },
        "required": list(kinds),
        "additionalProperties": False,
    }
    said = {"s": "é", "i": 3.0, "f": 2, "b": True, "j": [{"x": None}], "y": "é", "type": "t"}
    (row,) = made.rows(answer(json.dumps(said)))  # type: ignore[misc]
    assert row == ("é", 3, 2.0, True, [{"x": None}], "é".encode(), "t")
    assert [type(v) for v in row] == [str, int, float, bool, list, bytes, str]
    assert made.values(answer(json.dumps(said))) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1', "is not JSON"),
        ("[]", "at $: [] is not of type 'object'"),
        ('{"a": "1", "b": "x"}', "at $.a: '1' is not of type 'integer'"),
        ('{"a": 1}', "'b' is a required property"),
        ('{"a": 1, "b": "x", "c": 1}', "'c' was unexpected"),
        ('{"a": true, "b": "x"}', "at $.a: True is not of type 'integer'"),
        ('{"a": 1, "b": null}', "at $.b: None is not of type 'string'"),
    ],
)
def test_an_answer_that_does_not_fit_the_columns_is_an_error(text: str, said: str) -> None:
    """Each answer is checked even if vLLM was given the schema, and the error shows the position."""
    message = refused(decoder(schema={"a": "int", "b": "str"}), text)
    assert said in message
    assert message.endswith(text)


def test_numbers_fit_their_columns() -> None:
    """An integer beyond 64 bits, or a number beyond a float, is a value but no row."""
    assert "more than 64 bits" in refused_row(decoder(schema={"a": "int"}), '{"a": 9223372036854775808}')
    assert "too large" in refused_row(decoder(schema={"a": "float"}), '{"a": 1%s}' % ("0" * 400))
    assert decoder(schema={"a": "json"}).rows(answer('{"a": 9223372036854775808}')) == [(2**63,)]


# ---------------------------------------------------------------------- JSON Schemas


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string", "format": "date"}, "str"),
        ({"type": "integer", "minimum": 1}, "int"),
        ({"type": "number"}, "float"),
        ({"type": "boolean"}, "bool"),
        ({"type": ["string", "null"]}, "str"),
        ({"type": ["integer", "number"]}, "float"),
        ({"type": ["integer", "string"]}, "json"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "int"),
        ({"anyOf": [{"$ref": "#/$defs/Word"}, {"type": "null"}]}, "str"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "float"),
        ({"allOf": [{"$ref": "#/$defs/Word"}], "description": "d"}, "str"),
        ({"$ref": "#/$defs/Word"}, "str"),
        ({"$ref": "#/$defs/Circle"}, "json"),
        ({"enum": ["a", "b", None]}, "str"),
        ({"enum": [1, 2]}, "int"),
        ({"enum": [1, "b"]}, "json"),
        ({"const": True}, "bool"),
        ({"type": "array", "items": {"type": "string"}}, "json"),
        ({"type": "object", "properties": {"x": {"type": "string"}}}, "json"),
        ({"type": "null"}, "json"),
        ({}, "json"),
        (True, "json"),
    ],
)
def test_each_property_is_a_column_of_its_type(schema: Any, kind: str) -> None:
    """Scalars have their own type, with or without null; all other values are JSON."""
    defs = {"Word": {"enum": ["a", "b"], "type": "string"}, "Circle": {"$ref": "#/$defs/Circle"}}
    whole = {"type": "object", "properties": {"x": schema, "y": {"type": "string"}}, "$defs": defs}
    made = decoder(schema=whole)
    assert columns(made) == {"x": kind, "y": "str"}
    assert made.schema == whole


def test_optional_properties_may_be_absent_or_null() -> None:
    """Both are NULL in the table; predict returns the model's own value."""
    schema = {**INT_AND_TEXT, "properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"]}}}
    made = decoder(schema=schema)
    assert made.rows(answer('{"a": 1}')) == [(1, None)]
    assert made.rows(answer('{"a": 1, "b": null}')) == [(1, None)]
    assert made.values(answer('{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}},
        {"type": "object"},
        {**INT_AND_TEXT, "additionalProperties": True},
        {**INT_AND_TEXT, "additionalProperties": {}},
        {**INT_AND_TEXT, "patternProperties": {"^x": {}}},
        {**INT_AND_TEXT, "allOf": [{"properties": {"c": {}}}]},
        {**INT_AND_TEXT, "type": ["object", "null"]},
        {"anyOf": [INT_AND_TEXT, {"type": "array"}]},
    ],
)
def test_what_is_no_fixed_set_of_properties_is_one_json_column(schema: Any) -> None:
    """Nothing that a schema allows is lost for want of a column."""
    assert columns(decoder(schema=schema)) == {"output": "json"}


def test_a_scalar_schema_is_one_typed_column() -> None:
    """A scalar schema works like a datatype, and is sent to vLLM, too."""
    made = decoder("json", {"enum": ["good", "bad"]})
    assert columns(made) == {"output": "str"}
    assert made.rows(answer('"good"')) == [("good",)]
    assert "'ugly' is not one of ['good', 'bad']" in refused(made, '"ugly"')


def test_a_property_without_a_column_is_an_error_and_no_loss() -> None:
    """predict keeps a property that the schema does not name; a table has no column and refuses it."""
    made = decoder(schema=INT_AND_TEXT)
    assert made.values(answer('{"a": 1, "z": 2}')) == {"a": 1, "z": 2}
    assert "['z'], which no column can store" in refused_row(made, '{"a": 1, "z": 2}')


def test_nested_schemas_references_patterns_and_formats_are_checked() -> None:
    """All keywords of JSON Schema are checked, at any depth and in recursion, too."""
    tree = {
        "$ref": "#/$defs/Tree",
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z]+$"},
                    "born": {"type": "string", "format": "date"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                },
                "required": ["name"],
                "additionalProperties": False,
            }
        },
    }
    made = decoder(schema=tree)
    assert columns(made) == {"name": "str", "born": "str", "children": "json"}
    child = {"name": "b", "born": "2024-01-31"}
    assert made.rows(answer(json.dumps({"name": "a", "children": [child]}))) == [("a", None, [child])]
    assert "$.children[0].name" in refused(made, '{"name": "a", "children": [{"name": "B"}]}')
    assert "is not a 'date'" in refused(made, '{"name": "a", "born": "2024-02-31"}')


def test_a_check_that_breaks_is_an_error_of_the_row() -> None:
    """A number too large for the validator's arithmetic ends the row, not the run."""
    made = decoder(schema={"type": "number", "multipleOf": 0.1})
    assert "cannot be checked" in refused(made, "1" + "0" * 400)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


INT64 = st.integers(-(2**63), 2**63 - 1)


EVERY_KIND = {
    "s": ("str", st.text()),
    "i": ("int", INT64),
    "f": ("float", st.floats(allow_nan=False, allow_infinity=False)),
    "b": ("bool", st.booleans()),
    "j": ("json", JSON_VALUES),
}


@given(
    rows=st.lists(st.fixed_dictionaries({name: values for name, (_, values) in EVERY_KIND.items()})),
    escaped=st.booleans(),
)
def test_any_value_of_a_schema_survives(rows: list[dict[str, Any]], escaped: bool) -> None:
    """The model's JSON comes out of values and rows unchanged, one row per item."""
    made = decoder(schema={name: kind for name, (kind, _) in EVERY_KIND.items()}, flatten=True)
    said = answer(json.dumps(rows, ensure_ascii=escaped))
    assert made.values(said) == rows
    assert made.rows(said) == [tuple(row[name] for name in EVERY_KIND) for row in rows]


@given(text=st.text() | st.from_regex(r'[\[\]{}":,0-9eE\\u.trufalsn-]{0,40}', fullmatch=True))
@pytest.mark.parametrize("datatype", ["int", "float", "bool", "json", "bytes", "str"])
def test_no_answer_breaks_a_decoder(datatype: Any, text: str) -> None:
    """Any text of a model is a value of the type or an error of its row, never an exception."""
    made = decoder(datatype)
    value, rows = made.values(answer(text)), made.rows(answer(text))
    if isinstance(value, RowError):
        assert rows == value
    else:
        assert rows == [(value,)]
        assert datatype in ("json", type(value).__name__)
        assert not isinstance(value, float) or math.isfinite(value)


# ---------------------------------------------------------------------- pydantic


def test_a_pydantic_model_is_asked_checked_and_filled_in() -> None:
    """The model's own validators run, its defaults are filled in, and the result is plain data."""
    made = decoder(schema=PERSON)
    assert columns(made) == PERSON_COLUMNS
    assert made.schema == Person.model_json_schema()
    text = '{"name": " Ann ", "age": 3, "born": "2024-01-31", "home": {"street": "x"}}'
    expected = {
        "name": "Ann",
        "age": 3,
        "height": None,
        "mood": "good",
        "kind": "a",
        "born": "2024-01-31",
        "home": {"street": "x", "number": None},
    }
    assert made.values(answer(text)) == expected
    assert made.rows(answer(text)) == [tuple(expected.values())]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "age": -1}', "['age']: Input should be greater than or equal to 0"),
        ('{"name": "Nobody", "age": 1}', "['name']: Value error, there is no Nobody"),
        ('{"name": "Bug", "age": 1}', "ZeroDivisionError: a bug of the model's own"),
        ('{"age": 1, "home": {"street": 1}}', "['name']: Field required; and 1 more"),
        ('{"name": "a", "age": 1, "height": NaN}', "has NaN"),
        ("{", "is not JSON"),
    ],
)
def test_an_answer_that_pydantic_refuses_is_an_error(text: str, said: str) -> None:
    """The error has pydantic's message and position, and the raw text."""
    message = refused(decoder(schema=PERSON), text)
    assert said in message
    assert message.endswith(text)


def test_other_shapes_of_pydantic_models() -> None:
    """A model that allows more is one JSON column, a root model is what it wraps, an alias a column."""
    open_ended = decoder(schema="tests.calls.people.Open")
    assert columns(open_ended) == {"output": "json"}
    assert open_ended.rows(answer('{"a": 1, "b": 2}')) == [({"a": 1, "b": 2},)]
    assert columns(decoder(schema="tests.calls.people.People")) == {"output": "json"}
    aliased = decoder(schema="tests.calls.people.Aliased")
    assert columns(aliased) == {"outer": "int"}
    assert aliased.rows(answer('{"outer": 1}')) == [(1,)]
