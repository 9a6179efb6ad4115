"""The fields of JSON objects, and the kinds of their values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs lack it
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.sources.keys import key_type
from vllm_tasks.datalayer.storable import INT64
from vllm_tasks.datalayer.values import Number, number, whole

KINDS = {bool: "true or false", int: "a whole number", str: "a text", list: "a list", dict: "an object"}
SHAPES = 10_000
"""Different kinds of rows that are held at once."""
SPACE = " \t\r\n"
WIDE = pa.decimal128(38, 0)
MIXED = pa.sparse_union([pa.field("text", pa.string()), pa.field("other", pa.json_(pa.string()))])
"""SQL type of texts mixed with numbers or bools. With JSON, each text would get quotes: a number in the last
line would change the results of CAST(... AS VARCHAR) and = for all texts before it."""


class Wide(int):
    """A whole number beyond 64 bits."""


def _whole(text: str) -> int | float:
    value = whole(text)
    return value if isinstance(value, Number) or value in INT64 else Wide(value)


decode = json.JSONDecoder(parse_float=number, parse_int=_whole, parse_constant=Number).decode
"""As `values.from_json`, but with `Wide`."""
_raw_decode = json.JSONDecoder(parse_constant=Number, parse_int=len).raw_decode


def kind_name(kind: type) -> str:
    """The name of a type in errors."""
    return KINDS.get(kind, "a whole number" if kind is Wide else "a number with a fraction")


class Fields:
    """The fields of all rows of a table."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.kinds: dict[str, list[type]] = {}
        """Types by field, in the order in which they were first seen, without None."""
        shapes: dict[tuple[tuple[str, ...], tuple[type, ...]], None] = {}
        for row in rows:
            shapes[tuple(row), tuple(map(type, row.values()))] = None
            if len(shapes) > SHAPES:
                self._add(shapes)
                shapes.clear()
        self._add(shapes)

    def _add(self, shapes: Iterable[tuple[tuple[str, ...], tuple[type, ...]]]) -> None:
        for names, types in shapes:
            for name, kind in zip(names, types, strict=True):
                seen = self.kinds.setdefault(name, [])
                if kind not in seen and kind is not type(None):
                    seen.append(kind)

    def key_type(self, name: str) -> pa.DataType:
        """The type in which a key of this column is stored: text, whole number or bool, as in the first row.

        Raises `InvalidCall` for other types.
        """
        kinds = self.kinds.get(name) or [str]
        if kinds[0] in (str, bool):
            return pa.string() if kinds[0] is str else pa.bool_()
        if kinds[0] in (int, Wide):
            return WIDE if Wide in kinds else pa.int64()
        nested: dict[type, pa.DataType] = {list: pa.list_(pa.null()), dict: pa.struct([])}
        return key_type(name, nested.get(kinds[0], pa.float64()))

    def stream_type(self, name: str) -> pa.DataType:
        """The type of this field in SQL: DOUBLE if some numbers are not whole, `MIXED` for texts mixed with
        other plain values, otherwise a type that holds every value exactly, JSON if there is no other."""
        kinds = self.kinds[name]
        if (len(kinds) > 1 and {*kinds} <= {int, float, Number}) or kinds == [Number]:
            # As JSON they would be compared wrongly: DuckDB converts 9.25 to a whole number for `> 9`.
            return pa.float64()
        if str in kinds and len(kinds) > 1 and not {list, dict} & set(kinds):
            return MIXED
        if len(kinds) > 1:
            return pa.json_(pa.string())
        plain: dict[type, pa.DataType] = {
            str: pa.string(),
            int: pa.int64(),
            bool: pa.bool_(),
            float: pa.float64(),
        }
        return plain.get(kinds[0], pa.json_(pa.string())) if kinds else pa.string()


def value_texts(text: str) -> dict[str, str]:
    """The JSON text of each value of an object, exactly as it is in `text`, which is valid."""
    found: dict[str, str] = {}
    at = _behind(text, text.index("{") + 1)
    while text[at] == '"':
        name, at = scanstring(text, at + 1)
        start = _behind(text, text.index(":", at) + 1)
        _, at = _raw_decode(text, start)
        found[name] = text[start:at]
        at = _behind(text, at, SPACE + ",")
    return found


def _behind(text: str, at: int, signs: str = SPACE) -> int:
    while text[at] in signs:
        at += 1
    return at
