"""Columns of Delta tables: their types, the values that they can hold, and what those become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.lake.partitions import problem_of_partition
from vllm_tasks.datalayer.storable import HALF_A_CHARACTER, INT64, is_text, to_json
from vllm_tasks.datalayer.vectors import VECTOR

ARROW_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "json": pa.string(),
    "timestamp": pa.timestamp("us", "UTC"),
    "vector": VECTOR,
}
JSON = {"json": "1"}
"""Metadata of a text column that holds JSON."""


def arrow_column(name: str, kind: pa.DataType, values: Sequence[Any], as_json: bool = False) -> pa.Array:
    """The column in Arrow; raises ValueError naming it when a value does not fit."""
    try:
        if as_json:
            values = [None if v is None else to_json(v) for v in values]
        elif pa.types.is_string(kind):
            for v in values:
                if v is not None and not isinstance(v, str):
                    raise TypeError(f"{v!r:.100} is not a text")
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"column {name!r} ({kind}) cannot hold a value: {e}") from e


def problem_of(field: pa.Field, in_partition: bool = False) -> Callable[[Any], str | None]:
    """A function that returns why the column cannot hold a value, None if it can."""
    if in_partition and pa.types.is_string(field.type):
        as_json = bool((field.metadata or {}).get(b"json"))
        return lambda v: (
            problem_of(field)(v)
            or (None if v is None else problem_of_partition(field.name, to_json(v) if as_json else v))
        )
    if (field.metadata or {}).get(b"json"):
        return _no_json
    if pa.types.is_string(field.type):
        return _no_text
    if pa.types.is_int64(field.type):
        return _no_int
    plain_types: dict[pa.DataType, tuple[type, ...]] = {
        pa.bool_(): (bool,),
        pa.binary(): (bytes,),
        pa.timestamp("us", "UTC"): (datetime,),
    }
    if (types := plain_types.get(field.type)) is not None:
        return lambda v: (
            None if v is None or isinstance(v, types) else f"{v!r:.100} is not of type {types[0].__name__}"
        )
    return lambda v: _no_arrow(field.type, v)


def _no_arrow(kind: pa.DataType, value: Any) -> str | None:
    if type(value) is float and pa.types.is_float64(kind):
        return None
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
        return f"{e} ({kind})"
    return None


def _no_int(value: Any) -> str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value in INT64):
        return None
    return f"{value!r:.100} is not a whole number of 64 bits"


def _no_text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return f"{value!r:.100} is not a text"
    return None if is_text(value) else HALF_A_CHARACTER


def _no_json(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return _no_text(to_json(value))
    except (TypeError, ValueError, RecursionError) as e:
        return f"cannot be JSON: {e}"
