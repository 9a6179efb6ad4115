"""Checks of the rows for `Tables.put`: one row for each key, of types that every lake and database has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.rows import BuiltinType

KINDS: dict[pa.DataType, BuiltinType | Literal["timestamp"]] = {
    pa.int64(): "int",
    pa.float64(): "float",
    pa.bool_(): "bool",
    pa.string(): "str",
    pa.timestamp("us", "UTC"): "timestamp",
}
WAY_OUT = "name another table, or drop that one if its rows are not needed"
"""The way out when the table exists with other columns."""


def checked(name: str, rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """`rows` with the key's columns first and without metadata; raises `InvalidCall` if refused."""
    _refuse_names(name, rows.column_names)
    missing = [column for column in key if column not in rows.column_names]
    if missing or not key or len(set(key)) < len(key):
        hint = near(missing[0], rows.column_names) if missing else ""
        raise InvalidCall(f"{name!r}: key={list(key)!r} must be of the columns {rows.column_names}{hint}")
    for field in rows.schema:
        if field.type not in KINDS:
            raise InvalidCall(
                f"{name!r}: the column {field.name!r} is of type {field.type}; cast it to one of "
                f"{', '.join(map(str, KINDS))}"
            )
        if field.name in key and pa.types.is_floating(field.type):
            raise InvalidCall(f"{name!r}: the key {field.name!r} is a floating-point number; make it text")
    columns = [*key, *(column for column in rows.column_names if column not in key)]
    plain = rows.select(columns).cast(pa.schema([(n, rows.schema.field(n).type) for n in columns]))
    _refuse_keys(name, plain.select(list(key)))
    return plain


def _refuse_names(name: str, columns: Sequence[str]) -> None:
    for each in (name, *columns):
        if not each or not each.isprintable():
            raise InvalidCall(f"{name!r}: {each!r} cannot name a table or column; give a printable name")
    folded = [column.casefold() for column in columns]
    for column in columns:
        if folded.count(column.casefold()) > 1:
            raise InvalidCall(
                f"{name!r}: two columns are named {column!r}, since case does not count; rename one"
            )


def _refuse_keys(name: str, keys: pa.Table) -> None:
    for column in keys.column_names:
        if nulls := keys[column].null_count:
            raise InvalidCall(f"{name!r}: the key {column!r} is NULL in {nulls} rows")
    counted = keys.group_by(keys.column_names).aggregate([([], "count_all")])
    twice = counted.filter(pc.greater(counted["count_all"], 1))
    if twice.num_rows:
        example = twice.select(keys.column_names).slice(0, 1).to_pylist()[0]
        raise InvalidCall(
            f"{name!r}: {twice.num_rows} keys occur in several rows, for example {example!r:.200}"
        )
