"""Columns whose values DuckDB would change, and the expressions that replace them in a SELECT."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.sources.pieces import Pieces
from vllm_tasks.datalayer.workspace import literal

Kinds = dict[str, set[pa.DataType]]
DIGITS = 38
"""Maximum digits of DuckDB's decimals."""


def refused_in_sql(source: Pieces, columns: Sequence[str]) -> dict[str, str]:
    """By column, an expression that fails only those SELECTs that use it."""
    found: dict[str, str] = {}
    for where, schema in source.schemas():
        for name in columns:
            numbers = schema.get_all_field_indices(name)
            if len(numbers) > 1:
                why = f"{where} has {len(numbers)} columns {name!r:.100}; give each another name"
            elif numbers and _changed(kind := schema.field(numbers[0]).type):
                why = (
                    f"the column {name!r:.100} of {where} is of the type {str(kind)[:100]}, which SQL would "
                    "change; name the table itself instead of a SELECT, or leave the column out"
                )
            else:
                continue
            found.setdefault(name, f"error({literal(why)})")
    return found


def kinds_of(source: Pieces) -> Kinds:
    """The types that each column has in the files of a table."""
    kinds: Kinds = {}
    for _, schema in source.schemas():
        for field in schema:
            kinds.setdefault(field.name, set()).add(field.type)
    return kinds


def mixes_numbers(kinds: Kinds, columns: Sequence[str]) -> bool:
    """Whether a column has whole numbers of 64 bits in one file and floats in another. DuckDB reads them as
    floats and rounds the large ones; `ColumnStream` refuses those."""
    wide = {pa.int64(), pa.uint64()}
    return any(
        not wide.isdisjoint(kinds[name]) and any(map(pa.types.is_floating, kinds[name]))
        for name in columns
        if name in kinds
    )


def plain_times(kinds: Kinds, columns: Sequence[str]) -> dict[str, str]:
    """By column of times of day, an expression without a zone. DuckDB gives a zone to times that Parquet
    marks as UTC, as pyarrow once marked all."""
    return {
        name: _without_zone(quoted(name), time)
        for name in columns
        if len(there := set(map(_time, kinds.get(name, ())))) == 1 and (time := next(iter(there)))
    }


def _without_zone(column: str, kind: str) -> str:
    if kind.startswith("TIME_NS"):  # times with a zone have lost their nanoseconds
        why = literal(f"the column {column} has nanoseconds that SQL would drop; name the table itself")
        return f"if(typeof({column}) LIKE 'TIME WITH%', error({why}), {column})"
    return f"CAST({column} AS {kind})"


def _changed(kind: pa.DataType) -> bool:
    t = pa.types
    if t.is_dictionary(kind) or t.is_run_end_encoded(kind):
        return _changed(kind.value_type)
    if t.is_union(kind) or (isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.bool8"):
        return True
    if t.is_nested(kind):
        return any(_changed(kind.field(i).type) for i in range(kind.num_fields))
    wide = t.is_decimal(kind) and (kind.precision > DIGITS or kind.scale < 0)
    return bool(wide or t.is_float16(kind) or t.is_duration(kind) or t.is_interval(kind))


def _time(kind: pa.DataType) -> str | None:
    t = pa.types
    if t.is_list(kind) or t.is_large_list(kind):
        inner = _time(kind.value_type)
        return inner and f"{inner}[]"
    if not t.is_time(kind):
        return None
    return "TIME_NS" if kind.unit == "ns" else "TIME"
