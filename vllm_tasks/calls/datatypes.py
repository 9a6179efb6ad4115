"""The types of an answer: how its text becomes a value, and how a table stores the value."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Never

from pydantic import BaseModel, ConfigDict, Field

from vllm_tasks.calls.callables import DottedCallable
from vllm_tasks.calls.functions import made_of
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.datalayer.storable import INT64
from vllm_tasks.errors import is_of_the_row
from vllm_tasks.rows import BuiltinType, Choice

OUTPUT = "output"
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
DEEPEST = 100
"""Levels of nested lists and objects. Databases and other readers of JSON have a limit on the depth."""
MOST_DIGITS = 4_300
"""Digits of an integer. Python reads no more by default (`sys.set_int_max_str_digits`)."""
SHOWN = 300
"""Characters of a reason in an error."""


class DataType(BaseModel):
    """A custom type of answers. `decoder` turns an answer's text into a value; without it, the value is the
    text. `encoder` turns the value into what tables store: a text, or bytes if it is annotated `-> bytes`;
    without it, tables store the answer's text."""

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1)
    encoder: DottedCallable | None = None
    decoder: DottedCallable | None = None


class Undecodable(ValueError):
    """An answer that is not of the requested type. The message has the reason, but not the answer."""


def _value_itself(value: Any, _: Any) -> Any:
    return value


def of_text(read: Callable[[str], Any]) -> Callable[[Choice], Any]:
    """Return the reader of a choice that looks at its text alone."""
    return lambda choice: read(choice.text)


@dataclass(frozen=True)
class AnswerType:
    """The type of one choice of an answer, and the columns of the outputs table that store it."""

    columns: tuple[OutputColumn, ...]
    read: Callable[[Choice], Any]
    """Returns the value of a choice; raises `Undecodable`."""
    identity: Callable[[], Any]
    """Returns what determines the fields above, as JSON; raises `InvalidCall` if it cannot be determined."""
    write: Callable[[Any, Any], Any] = _value_itself
    """Returns what is stored of a value and the text that it was read from; raises `Undecodable`."""
    schema: dict[str, Any] | None = None
    """The JSON Schema that requests require of answers."""
    by_name: bool = False
    """Whether a value is an object with the columns' names, rather than the value of one column."""
    may_be_list: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters without which an answer is not of this type."""
    ending: str = ""
    """Lines at the end of each prompt."""
    thinks: bool = True
    """Whether a reasoning model may think before such an answer."""

    def row(self, value: Any, text: Any) -> tuple[Any, ...]:
        """Return a value for each column, None for a missing one; raise `Undecodable` for another type."""
        if not self.by_name:
            return (fitted(self.write(value, text), self.columns[0]),)
        if not isinstance(value, dict):
            raise Undecodable(f"is a {type(value).__name__}, not an object")
        if unknown := value.keys() - {column.name for column in self.columns}:
            raise Undecodable(
                f"has {sorted(unknown)!r:.200}, which no column can store; refuse it in the schema with "
                "'additionalProperties': False, or allow it (True), which stores answers in one column"
            )
        return tuple(fitted(value.get(column.name), column) for column in self.columns)


def fitted(value: Any, column: OutputColumn) -> Any:
    """Return the value in the column's type; raise `Undecodable` if it is of another type."""
    if value is None or column.kind == "json":
        return value
    if column.kind == "bytes" and isinstance(value, str | bytes):
        return value if isinstance(value, bytes) else _encoded(value)
    if column.kind == "vector" and isinstance(value, list):
        return value
    if column.kind == "str" and isinstance(value, str):
        _encoded(value)
        return value
    if column.kind == "bool" and isinstance(value, bool):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if column.kind == "int" and value == int(value):  # JSON's 1.0 is an integer too
            return _int64(int(value))
        if column.kind == "float":
            return _float64(value)
    raise Undecodable(f"is a {type(value).__name__} in {column.name!r}, not a value of type {column.kind}")


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise Undecodable("has half a character (a lone surrogate)") from error


def _int64(value: int) -> int:
    if value not in INT64:
        raise Undecodable("is an integer of more than 64 bits")
    return value


def _float64(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Undecodable("is a number too large for 64 bits")
    return number


# ---------------------------------------------------------------------- built-in types


def _read_str(text: str) -> str:
    return text


def _read_int(text: str) -> int:
    if not INTEGER.fullmatch(digits := text.strip()):
        raise Undecodable("is not an integer of 64 bits")
    return _int64(int(digits))


def _read_float(text: str) -> float:
    if not NUMBER.fullmatch(digits := text.strip()):
        raise Undecodable("is not a finite decimal number")
    return _float64(float(digits))


def _read_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in TRUTH:
        raise Undecodable(f"is none of {', '.join(TRUTH)}")
    return TRUTH[word]


def read_json(text: str) -> Any:
    """Return the JSON value in `text`. Datatypes and metrics use the same rules.

    Raises `Undecodable` also for NaN and infinities, which only Python reads as JSON, for values that no
    table can store (floats too large for 64 bits, integers of more than 4,300 digits, lone surrogates), and
    for more than 100 levels.
    """
    try:
        text.encode()
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
        if "\\u" in text:  # a lone surrogate may be escaped, and then cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Undecodable("has half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise Undecodable(f"is nested deeper than {DEEPEST} levels") from error
    except Undecodable:
        raise
    except ValueError as error:
        raise Undecodable(f"is not JSON: {error}"[:SHOWN]) from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise Undecodable(f"is nested deeper than {DEEPEST} levels")
    return value


def _no_number(word: str) -> Never:
    raise Undecodable(f"has {word}, which is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Undecodable(f"has the number {digits[:50]}, which is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Undecodable(f"has an integer of more than {MOST_DIGITS:,} digits")
    return int(digits)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, list | dict)]:
        depth += 1
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]
    return depth


READERS: dict[BuiltinType, Callable[[str], Any]] = {
    "str": _read_str,
    "int": _read_int,
    "float": _read_float,
    "bool": _read_bool,
    "json": read_json,
    "bytes": _encoded,
}


def builtin_type(kind: BuiltinType) -> AnswerType:
    """Return the answer type of a built-in type."""
    column = OutputColumn(OUTPUT, kind)
    return AnswerType((column,), of_text(READERS[kind]), lambda: kind, may_be_list=kind == "json")


# ---------------------------------------------------------------------- own types


def own_type(own: DataType) -> AnswerType:
    """Return the answer type of a caller's own type."""
    kind = _written_kind(own.encoder)

    def read(text: str) -> Any:
        return text if own.decoder is None else _called(own.decoder, text, f"decoder of {own.identifier!r}")

    def write(value: Any, text: Any) -> Any:
        if own.encoder is None:
            return text
        written = _called(own.encoder, value, f"encoder of {own.identifier!r}")
        if not isinstance(written, bytes if kind == "bytes" else str):
            raise Undecodable(
                f"was turned into a {type(written).__name__} by the encoder of {own.identifier!r}, which "
                f"must return {kind} (bytes only if it is annotated '-> bytes')"
            )
        return written

    def identity() -> Any:
        coders = {"encoder": own.encoder, "decoder": own.decoder}
        made = {name: made_of(coder, f"{name} of {own.identifier!r}") for name, coder in coders.items()}
        return {"identifier": own.identifier, **made}

    columns = (OutputColumn(OUTPUT, kind),)
    return AnswerType(columns, of_text(read), identity, write, may_be_list=own.decoder is not None)


def _called(function: Callable[..., Any], value: Any, what: str) -> Any:
    try:
        return function(value)
    except BaseException as error:
        if not is_of_the_row(error):
            raise
        raise Undecodable(f"is refused by the {what}: {type(error).__name__}: {error}"[:SHOWN]) from error


def _written_kind(encoder: Callable[..., Any] | None) -> BuiltinType:
    if encoder is bytes:
        return "bytes"
    try:
        annotation = inspect.signature(encoder).return_annotation if encoder else str
    except ValueError:  # some built-ins have no signature
        return "str"
    return "bytes" if annotation in (bytes, "bytes") else "str"
