"""Decoders of answers, own types, and the messages of answers that are refused."""

from __future__ import annotations

from datetime import date
from typing import Any

from vllm_tasks import RowError
from vllm_tasks.calls.answers import Decoder
from vllm_tasks.results import Choice, Completion

INT_AND_TEXT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a"],
}


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


def as_date(text: str) -> date:
    return date.fromisoformat(text.strip())


def iso(value: date) -> str:
    return value.isoformat()


def packed(value: date) -> bytes:
    return value.toordinal().to_bytes(4, "big")


def words(text: str) -> list[str]:
    return text.split()
