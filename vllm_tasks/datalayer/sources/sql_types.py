"""Keys of databases in Arrow: the types that hold them exactly, and arrays of the drivers' values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa


def key_array(values: Sequence[Any], field: pa.Field, wrong: dict[int, str], first: int = 0) -> pa.Array:
    """A column of keys; `wrong` receives why values do not fit (NULL), by number, starting with `first`."""
    if pa.types.is_string(field.type):
        values = [v if v is None or isinstance(v, str) else str(v) for v in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return pa.array([_one(v, field, first + i, wrong) for i, v in enumerate(values)], field.type)


def _one(value: Any, field: pa.Field, number: int, wrong: dict[int, str]) -> Any:
    try:
        pa.array([value], field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        wrong[number] = f"{field.name}={str(value)[:100]!a} is not of type {field.type}"
        return None
    return value


ARROW = {
    **dict.fromkeys(("smallint", "integer", "bigint", "int"), pa.int64()),
    "boolean": pa.bool_(),
    "bytea": pa.binary(),
    "blob": pa.binary(),
    "date": pa.date32(),
    "timestamp without time zone": pa.timestamp("us"),
    "timestamp with time zone": pa.timestamp("us", "UTC"),
}
"""Types by PostgreSQL's and SQLite's names; keys of other types are stored as text."""


def stored_as(kind: Any, spec: str) -> pa.DataType:
    """The type in which a key is stored; text if the database does not report its type."""
    if isinstance(kind, sa.Integer):
        unsigned = getattr(kind, "unsigned", False) and spec.startswith("bigint")
        return pa.decimal128(20, 0) if unsigned else pa.int64()
    if isinstance(kind, sa.Numeric) and kind.precision and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale or 0)
    if isinstance(kind, sa.LargeBinary | sa.BINARY | sa.VARBINARY):
        return pa.binary()
    if isinstance(kind, sa.DateTime):
        return pa.timestamp("us")
    if isinstance(kind, sa.Date):
        return pa.date32()
    return ARROW.get(spec, pa.string())
