"""Answers become values for `predict`, rows for tables, and errors if they are not of the requested type."""

from __future__ import annotations

import enum
import functools
import json
import math
import re
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, field_validator

from tests.servers.scripted_server import Asked, Reply, ScriptedServer
from vllm_tasks import DataType, InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.calls.answers import Decoder
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Choice, Completion

INT_AND_TEXT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a"],
}


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["vllm_tasks", "tests"]')


def answer(*texts: str, finish_reason: str | None = "stop") -> Completion:
    return Completion(tuple(Choice(text, finish_reason) for text in texts))


def decoder(datatype: Any = None, schema: Any = None, **options: Any) -> Decoder:
    return Decoder.of(datatype, schema, **{"flatten": False, "many": False, **options})


def columns(made: Decoder) -> dict[str, str]:
    return {column.name: column.kind for column in made.columns}


def refused(made: Decoder, *texts: str) -> str:
    """The message of the error that both a value and rows of such an answer are."""
    value, rows = made.values(answer(*texts)), made.rows(answer(*texts))
    assert isinstance(value, RowError)
    assert (value.kind, value.retryable) == ("output", False)
    assert value == rows
    return value.message


def refused_row(made: Decoder, *texts: str) -> str:
    """The message of the error of an answer that is a value, but no row."""
    assert not isinstance(made.values(answer(*texts)), RowError)
    rows = made.rows(answer(*texts))
    assert isinstance(rows, RowError)
    assert (rows.kind, rows.retryable) == ("output", False)
    return rows.message


# ---------------------------------------------------------------------- built-in types


@pytest.mark.parametrize(
    ("datatype", "text", "value"),
    [
        (None, " as it is\n", " as it is\n"),
        ("str", "a\0b", "a\0b"),
        ("int", " 12\n", 12),
        ("int", "-9223372036854775808", -(2**63)),
        ("int", "+007", 7),
        ("float", " 1.5e3 ", 1500.0),
        ("float", "-.5", -0.5),
        ("float", "2", 2.0),
        ("bool", " Yes\n", True),
        ("bool", "FALSE", False),
        ("bool", "1", True),
        ("bool", "no", False),
        ("json", ' {"a": [1, null, "\\u00e9"]}\n', {"a": [1, None, "é"]}),
        ("json", "null", None),
        ("json", '"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ("bytes", " é", b" \xc3\xa9"),
    ],
)
def test_an_answer_of_its_type_is_a_value_and_a_row(datatype: Any, text: str, value: Any) -> None:
    """The value of `predict` and the column `output` agree, in the requested type."""
    made = decoder(datatype)
    assert made.values(answer(text)) == value
    assert type(made.values(answer(text))) is type(value)
    assert made.rows(answer(text)) == [(value,)]
    assert columns(made) == {"output": datatype or "str"}
    assert made.schema is None


@pytest.mark.parametrize(
    ("datatype", "text", "said"),
    [
        ("int", "1.0", "is not an integer"),
        ("int", "1_000", "is not an integer"),
        ("int", "\N{ARABIC-INDIC DIGIT THREE}", "is not an integer"),
        ("int", "9223372036854775808", "more than 64 bits"),
        ("int", "1" * 5000, "is not an integer of 64 bits"),
        ("int", "", "is not an integer"),
        ("float", "nan", "is not a finite"),
        ("float", "-inf", "is not a finite"),
        ("float", "1e999", "too large for 64 bits"),
        ("float", "1_0.5", "is not a finite"),
        ("float", "0x1p3", "is not a finite"),
        ("bool", "maybe", "is none of true, yes, 1, false, no, 0"),
        ("bool", "2", "is none of"),
        ("json", "", "is not JSON"),
        ("json", "{'a': 1}", "is not JSON"),
        ("json", "[1] and so on", "is not JSON"),
        ("json", "```json\n[1]\n```", "is not JSON"),
        ("json", "[NaN]", "has NaN"),
        ("json", "[-Infinity]", "has -Infinity"),
        ("json", "1e999", "too large"),
        ("json", '"\\ud800"', "half a character"),
        ("json", '{"\\udc00": 1}', "half a character"),
        ("json", "[" * 101 + "]" * 101, "nested deeper than 100"),
        ("json", '{"a":' * 200 + "1" + "}" * 200, "nested deeper than 100"),
        ("json", "[" * 100_000, "is n"),
        ("json", "1" * 5000, "more than 4,300 digits"),
        ("json", '"\ud800"', "half a character"),
    ],
)
def test_an_answer_of_another_type_is_an_error_with_the_answer_in_it(
    datatype: Any, text: str, said: str
) -> None:
    """The error gives the reason, and ends with the raw text."""
    message = refused(decoder(datatype), text)
    assert message.startswith("the answer ")
    assert said in message[:100]
    assert text[:2000] in message


def test_wide_json_is_not_deep_json() -> None:
    """Only nested lists count as depth, not lists side by side."""
    wide = [[i] for i in range(1000)]
    assert decoder("json").values(answer(json.dumps(wide))) == wide


def test_the_raw_text_in_an_error_is_bounded() -> None:
    """The error shows the first 2,000 characters of a long answer, and its length."""
    message = refused(decoder("int"), "x" * 10_000)
    assert message.endswith("x... (10,000 characters)")
    assert message.count("x") == 2000


# ---------------------------------------------------------------------- own types


def as_date(text: str) -> date:
    return date.fromisoformat(text.strip())


def iso(value: date) -> str:
    return value.isoformat()


def packed(value: date) -> bytes:
    return value.toordinal().to_bytes(4, "big")


def words(text: str) -> list[str]:
    return text.split()


def test_own_coders_by_callable_and_by_path() -> None:
    """`predict` returns the decoder's value, and the table keeps the encoder's value."""
    by_callable = DataType(identifier="date", decoder=as_date, encoder=iso)
    by_path = DataType.model_validate(
        {
            "identifier": "date",
            "decoder": "tests.calls.test_outputs.as_date",
            "encoder": "tests.calls.test_outputs.iso",
        }
    )
    for own in (by_callable, by_path):
        made = decoder(own)
        assert made.values(answer(" 2024-02-29 ")) == date(2024, 2, 29)
        assert made.rows(answer(" 2024-02-29 ")) == [("2024-02-29",)]
        assert columns(made) == {"output": "str"}


def test_an_encoder_annotated_so_gives_bytes() -> None:
    """The column's type is read off the encoder's annotation."""
    made = decoder(DataType(identifier="date", decoder=as_date, encoder=packed))
    assert columns(made) == {"output": "bytes"}
    assert made.rows(answer("0001-01-02")) == [(b"\0\0\0\2",)]


def test_without_coders_the_text_is_kept() -> None:
    """No decoder: predict gives the text; no encoder: the table keeps it."""
    assert decoder(DataType(identifier="d")).values(answer(" a")) == " a"
    made = decoder(DataType(identifier="d", decoder=as_date))
    assert made.values(answer("2024-01-01 ")) == date(2024, 1, 1)
    assert made.rows(answer("2024-01-01 ")) == [("2024-01-01 ",)]
    assert decoder(DataType(identifier="d", encoder=str.upper)).rows(answer("a")) == [("A",)]


def test_what_own_coders_raise_is_an_error_of_the_row() -> None:
    """The message names the exception, the type and its reason."""
    message = refused(decoder(DataType(identifier="date", decoder=as_date)), "soon")
    assert "refused by the decoder of 'date': ValueError: Invalid isoformat" in message
    broken = decoder(DataType(identifier="date", encoder=iso))
    assert "encoder of 'date': AttributeError" in refused_row(broken, "soon")


@pytest.mark.parametrize(
    "encoder",
    [str.encode, len, lambda x: None, lambda x: "\ud800"],
    ids=["unannotated", "int", "None", "half"],
)
def test_an_encoder_gives_what_a_column_can_keep(encoder: Any) -> None:
    """Anything but text, or bytes where it is annotated so, is an error of the row."""
    refused_row(decoder(DataType(identifier="d", encoder=encoder)), "x")


def test_lists_of_own_types_become_rows() -> None:
    """With flatten the encoder is applied to each item of the decoder's list."""
    own = DataType(identifier="words", decoder=words, encoder=str.upper)
    assert decoder(own, flatten=True).rows(answer("a b")) == [("A",), ("B",)]
    assert decoder(own, flatten=True).values(answer("a b")) == ["a", "b"]
    assert decoder(DataType(identifier="w", decoder=words), flatten=True).rows(answer("a b")) == [
        ("a",),
        ("b",),
    ]


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


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Address(BaseModel):
    street: str
    number: int | None = None


class Person(BaseModel):
    name: str
    age: Annotated[int, Field(ge=0)]
    height: float | None = None
    mood: Mood = Mood.GOOD
    kind: Literal["a", "b"] = "a"
    born: date | None = None
    home: Address | None = None

    @field_validator("name")
    @classmethod
    def _not_nobody(cls, value: str) -> str:
        if value == "Nobody":
            raise ValueError("there is no Nobody")
        if value == "Bug":
            raise ZeroDivisionError("a bug of the model's own")
        return value.strip()


class People(RootModel[list[Person]]):
    pass


class Open(BaseModel, extra="allow"):
    a: int


class Aliased(BaseModel):
    inner: int = Field(alias="outer")


PERSON = "tests.calls.test_outputs.Person"
PERSON_COLUMNS = {
    "name": "str",
    "age": "int",
    "height": "float",
    "mood": "str",
    "kind": "str",
    "born": "str",
    "home": "json",
}


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
    open_ended = decoder(schema="tests.calls.test_outputs.Open")
    assert columns(open_ended) == {"output": "json"}
    assert open_ended.rows(answer('{"a": 1, "b": 2}')) == [({"a": 1, "b": 2},)]
    assert columns(decoder(schema="tests.calls.test_outputs.People")) == {"output": "json"}
    aliased = decoder(schema="tests.calls.test_outputs.Aliased")
    assert columns(aliased) == {"outer": "int"}
    assert aliased.rows(answer('{"outer": 1}')) == [(1,)]


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
    for path in (PERSON, "tests.calls.test_outputs.People"):
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
        {"schema": "tests.calls.test_outputs.People"},
    ]
    told = [json.dumps(decoder(**option).identity()) for option in options]
    assert told == [json.dumps(decoder(**option).identity()) for option in options]
    assert len(set(told)) == len(options)


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
    for given_schema in (schema, "tests.calls.test_outputs.Verdict"):
        model = local_model.model_copy(update={"output_schema": given_schema})
        for value in model.predict_batches(prompts, max_tokens=200):
            assert value["colour"] in ("red", "green")
            assert isinstance(value["ok"], bool)


class Verdict(BaseModel):
    colour: Literal["red", "green"]
    ok: bool


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
