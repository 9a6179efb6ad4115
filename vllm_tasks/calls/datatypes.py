"""Types of an answer: how its text becomes a value, and the value what a table keeps."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never

from pydantic import BaseModel, ConfigDict, Field

from vllm_tasks.calls.callables import DottedCallable
from vllm_tasks.calls.functions import made_of
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.datalayer.storable import INT64
from vllm_tasks.rows import BuiltinType

OUTPUT = "output"
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
DEEPEST = 100
"""Lists and objects within each other; databases and other readers of JSON give up at some depth."""
MOST_DIGITS = 4_300
"""Of a whole number; Python reads no more unless it is told to (sys.set_int_max_str_digits)."""
SHOWN = 300
"""Characters of a reason."""


class DataType(BaseModel):
    """A type of one's own: `decoder` makes a value of an answer's text (the text itself without one),
    `encoder` makes of the value what tables keep, a text or (annotated so) bytes; without one, the
    answer's text is kept."""

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1)
    encoder: DottedCallable | None = None
    decoder: DottedCallable | None = None


class Undecodable(ValueError):
    """An answer that is not of the type asked for; the message says why, without the answer."""


def _value_itself(value: Any, _: Any) -> Any:
    return value


@dataclass(frozen=True)
class AnswerType:
    """What one text of an answer has to be, and the columns of the outputs table that keep it."""

    columns: tuple[OutputColumn, ...]
    read: Callable[[str], Any]
    """The value in a text; raises `Undecodable`."""
    identity: Callable[[], Any]
    """What decides the above, as JSON; raises `InvalidCall` where that cannot be told."""
    write: Callable[[Any, Any], Any] = _value_itself
    """What is kept of a value and the text it came from; raises `Undecodable`."""
    asked: dict[str, Any] | None = None
    """JSON Schema to ask of vLLM."""
    by_name: bool = False
    """A value is an object with the columns' names, not the value of one column."""
    may_be_list: bool = True

    def row(self, value: Any, text: Any) -> tuple[Any, ...]:
        """A value for each column, None where it has none; raises `Undecodable` for another type."""
        if not self.by_name:
            return (fitted(self.write(value, text), self.columns[0]),)
        if not isinstance(value, dict):
            raise Undecodable(f"is no object but a {type(value).__name__}")
        if unknown := value.keys() - {column.name for column in self.columns}:
            raise Undecodable(
                f"has {sorted(unknown)!r:.200}, which no column can keep; refuse it in the schema with "
                "'additionalProperties': False, or allow it (True), which keeps answers in one column"
            )
        return tuple(fitted(value.get(column.name), column) for column in self.columns)


def fitted(value: Any, column: OutputColumn) -> Any:
    """The value as the column's type; raises `Undecodable` unless it is one already."""
    if value is None or column.kind == "json":
        return value
    if column.kind == "bytes" and isinstance(value, str | bytes):
        return value if isinstance(value, bytes) else _encoded(value)
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
    raise Undecodable(f"is no {column.kind} in {column.name!r} but a {type(value).__name__}")


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
        raise Undecodable("is no integer of 64 bits")
    return _int64(int(digits))


def _read_float(text: str) -> float:
    if not NUMBER.fullmatch(digits := text.strip()):
        raise Undecodable("is no finite decimal number")
    return _float64(float(digits))


def _read_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in TRUTH:
        raise Undecodable(f"is none of {', '.join(TRUTH)}")
    return TRUTH[word]


def read_json(text: str) -> Any:
    """The JSON value in `text`: whether an answer is JSON is decided here, for datatypes and for metrics.

    Raises `Undecodable` also for what is JSON to Python only (NaN), for what no table could keep (numbers too
    large for 64 bits, whole ones of more than 4,300 digits, halves of characters), and for more than
    100 levels.
    """
    try:
        text.encode()
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
        if "\\u" in text:  # half a character can be escaped, and then not be written down
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Undecodable("has half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise Undecodable(f"is nested deeper than {DEEPEST}") from error
    except Undecodable:
        raise
    except ValueError as error:
        raise Undecodable(f"is not JSON: {error}"[:SHOWN]) from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise Undecodable(f"is nested deeper than {DEEPEST}")
    return value


def _no_number(word: str) -> Never:
    raise Undecodable(f"has {word}, which JSON does not know")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise Undecodable(f"has the number {digits[:50]}, which is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Undecodable(f"has a whole number of more than {MOST_DIGITS:,} digits")
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
    """A built-in type as the type of answers."""
    return AnswerType((OutputColumn(OUTPUT, kind),), READERS[kind], lambda: kind, may_be_list=kind == "json")


# ---------------------------------------------------------------------- own types


def own_type(own: DataType) -> AnswerType:
    """A type of the caller's as the type of answers."""
    kind = _written_kind(own.encoder)

    def read(text: str) -> Any:
        return text if own.decoder is None else _called(own.decoder, text, f"decoder of {own.identifier!r}")

    def write(value: Any, text: Any) -> Any:
        if own.encoder is None:
            return text
        written = _called(own.encoder, value, f"encoder of {own.identifier!r}")
        if not isinstance(written, bytes if kind == "bytes" else str):
            raise Undecodable(
                f"was made a {type(written).__name__} by the encoder of {own.identifier!r}, which must "
                f"return {kind} (bytes only where it is annotated so, '-> bytes')"
            )
        return written

    def identity() -> Any:
        coders = {"encoder": own.encoder, "decoder": own.decoder}
        told = {name: made_of(coder, f"{name} of {own.identifier!r}") for name, coder in coders.items()}
        return {"identifier": own.identifier, **told}

    columns = (OutputColumn(OUTPUT, kind),)
    return AnswerType(columns, read, identity, write, may_be_list=own.decoder is not None)


def _called(function: Callable[..., Any], value: Any, what: str) -> Any:
    try:
        return function(value)
    except Exception as error:  # whatever the caller's own code raises is this row's error
        raise Undecodable(f"is refused by the {what}: {type(error).__name__}: {error}"[:SHOWN]) from error


def _written_kind(encoder: Callable[..., Any] | None) -> BuiltinType:
    if encoder is bytes:
        return "bytes"
    try:
        annotation = inspect.signature(encoder).return_annotation if encoder else str
    except ValueError:  # some built-ins have no signature
        return "str"
    return "bytes" if annotation in (bytes, "bytes") else "str"
