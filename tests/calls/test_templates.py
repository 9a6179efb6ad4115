"""Templates: data never acts as one, and values become text."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calls.prompting import prompter, refusal
from vllm_tasks.calls.template import Template

ATTACKS = [
    "{x.__class__}",
    "{context}",
    "{input}",
    "{artifacts.secret}",
    "{0}",
    "{{",
    "}}",
    "{",
    "%s %(input)s",
    "${input}",
    "{{ input }}",
    "\\N{DIGIT ZERO}",
]


# ---------------------------------------------------------------------- templates


@pytest.mark.parametrize("attack", ATTACKS)
def test_data_never_acts_as_a_template(attack: str) -> None:
    """Texts in a record, the context or an artifact come out unchanged."""
    make = prompter(
        "{input}|{context}|{artifacts.secret}", context=attack, artifacts={"secret": attack, "other": "S"}
    )
    assert make(attack) == f"{attack}|{attack}|{attack}"


@given(st.text(st.characters(exclude_categories=("Cs",))), st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_passes_unchanged(value: str, context: str) -> None:
    """A prompt is its literal parts and its values, joined, for any values."""
    if value.lower() in ("nan", "nat"):
        value += "."
    assert prompter("a {input} b {context}", context=context)(value) == f"a {value} b {context}"


@pytest.mark.parametrize(
    "prompt",
    [
        "{input.__class__}",
        "{input.upper}",
        "{input[0]}",
        "{0[key]}",
        "{0.real}",
        "{input!r}",
        "{input:>10}",
        "{input:{width}}",
        "{}",
        "{!r}",
        "{ input }",
        "{-1}",
        "{²}",
        "{artifacts.}",
        "{artifacts.a.b}",
        "{artifacts.a[0]}",
        "{a-b}",
    ],
)
def test_a_field_that_is_more_than_a_key_is_refused(prompt: str) -> None:
    """Attributes, indexes, conversions, formats and empty fields are refused with the ways out."""
    with pytest.raises(ValueError, match="is not a plain key") as refused:
        Template.parse(prompt)
    assert prompt.replace(":{width}", "").strip("{}").split(":")[0] in str(refused.value)
    assert "prompt_func" in str(refused.value)
    assert "{{ }}" in str(refused.value)


@pytest.mark.parametrize("prompt", ["{", "}", "{input", "a } b", "{input!}", "{a!rb}"])
def test_an_unbalanced_template_is_refused(prompt: str) -> None:
    """The error shows a template that cannot be parsed, and how to write a literal brace."""
    with pytest.raises(ValueError, match="literal braces") as refused:
        Template.parse(prompt)
    assert repr(prompt) in str(refused.value)


def test_doubled_braces_are_literal() -> None:
    """`{{` and `}}` in a template stand for braces, and never open a field."""
    assert prompter('{{"answer": {input}}} {{input}}')(1) == '{"answer": 1} {input}'


def test_a_template_knows_its_fields() -> None:
    """Names, numbers and artifacts are fields; literal braces are not."""
    assert Template.parse("{a} {0} {artifacts.b} {{c}}").fields == {"a", "0", "artifacts.b"}


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("", ""),
        (0, "0"),
        (1.5, "1.5"),
        (True, "True"),
        (float("inf"), "inf"),
        (Decimal("1.10"), "1.10"),
        (dt.date(2026, 11, 22), "2026-11-22"),
        (dt.datetime(2026, 11, 22, 1, 2, 3), "2026-11-22 01:02:03"),
        (dt.time(1, 2), "01:02:00"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("nan", "nan"),
    ],
)
def test_plain_values_become_text(value: object, text: str) -> None:
    """Texts, numbers, dates, times and UUIDs print as Python prints them; a text `nan` is a text."""
    assert prompter("<{input}>")(value) == f"<{text}>"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is None"),
        (b"bytes", "a bytes"),
        (bytearray(b"x"), "a bytearray"),
        (["a"], "a list"),
        ({"a": 1}, "a dict"),
        (object(), "a object"),
        (float("nan"), "missing value"),
        (Decimal("NaN"), "missing value"),
        (Decimal("sNaN"), "missing value"),
    ],
)
def test_what_is_no_text_fails_its_row(value: object, said: str) -> None:
    """None, NaN, bytes and containers are that row's error, which names the field."""
    message = refusal(prompter()(value))
    assert said in message
    assert "'input'" in message


def test_numpy_scalars_count_as_what_they_are() -> None:
    """Numbers, booleans and dates of numpy are plain values, its NaN and NaT are missing ones."""
    np = pytest.importorskip("numpy")
    make = prompter()
    values = [np.int64(3), np.float32(0.5), np.bool_(True), np.str_("t"), np.datetime64("2026-11-22")]
    assert [make(v) for v in values] == ["3", "0.5", "True", "t", "2026-11-22"]
    for missing in (np.float32("nan"), np.float64("nan"), np.datetime64("NaT", "D")):
        assert "missing value" in refusal(make(missing))
    assert "ndarray" in refusal(make(np.array([1])))


def test_lone_surrogates_fail_their_row() -> None:
    """Text that no UTF-8 can carry is a row error, in a text as in chat messages."""
    assert "not valid Unicode" in refusal(prompter()("a\udcffb"))
    assert "not valid Unicode" in refusal(prompter(chat=True)("a\udcffb"))
    assert prompter()("a\U0001f600b") == "a\U0001f600b"
