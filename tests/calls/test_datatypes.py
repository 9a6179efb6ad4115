"""Answers of built-in and own types: values for `predict`, rows for tables, or errors."""

from __future__ import annotations

import json
import sys
from datetime import date
from typing import Any

import pytest

from tests.calls.decoding import answer, as_date, columns, decoder, iso, packed, refused, refused_row, words
from vllm_tasks import DataType

pytestmark = pytest.mark.usefixtures("own_modules")


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


def test_own_coders_by_callable_and_by_path() -> None:
    """`predict` returns the decoder's value, and the table keeps the encoder's value."""
    by_callable = DataType(identifier="date", decoder=as_date, encoder=iso)
    by_path = DataType.model_validate(
        {
            "identifier": "date",
            "decoder": "tests.calls.decoding.as_date",
            "encoder": "tests.calls.decoding.iso",
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
    exits = decoder(DataType(identifier="exits", decoder=sys.exit))
    assert "refused by the decoder of 'exits': SystemExit: soon" in refused(exits, "soon")


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
