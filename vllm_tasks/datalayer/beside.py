"""Joins source rows with their outputs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer.all_rows import refuse_missing, refuse_unreadable
from vllm_tasks.datalayer.selection import POSITION, Key
from vllm_tasks.datalayer.sources import Source, Unreadable
from vllm_tasks.datalayer.sources.keys import listed
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.datalayer.values import EPOCH, Nanoseconds, Number
from vllm_tasks.errors import InvalidCall

NOWHERE: list[int | None] = [None]
"""The position of the output for a row without one."""


def beside(source: Source, select: str, outputs: pa.Table, key: Sequence[str]) -> pa.Table:
    """All rows of `source`, in its order, with the columns of their outputs, NULL for rows without one.

    A flattened output gives one row for each position. Raises `InvalidCall` for missing columns, a column
    name that both have, and rows that cannot be read.
    """
    columns = source.columns()
    refuse_missing(select, key, columns)
    refuse_missing("the outputs", key, outputs.column_names)
    added = [name for name in outputs.column_names if name not in key]
    if twice := sorted({*added} & {*columns}):
        raise InvalidCall(
            f"{select!r} and its outputs both have a column {twice[0]!r}: rename it in a SELECT"
        )
    types = pa.schema([outputs.schema.field(name) for name in key])
    if POSITION in outputs.column_names:
        outputs = outputs.sort_by(POSITION)
    places: dict[Key, list[int | None]] = {}
    for place, found in enumerate(listed(outputs.select(list(key)), np.arange(outputs.num_rows))):
        places.setdefault(found, []).append(place)
    rows: list[tuple[Any, ...]] = []
    taken: list[int | None] = []
    unreadable = Unreadable()
    for part in source.parts(types, columns, unreadable):
        good = [i for i in range(part.count) if i not in part.errors]
        unreadable.count += len(part.errors)
        unreadable.examples += part.errors.values()
        keys = iter(listed(part.keys, good))
        for values in part.values(good):
            for row in values:
                found_at = places.get(next(keys), NOWHERE)
                if row is None:  # removed since its key was read
                    continue
                rows += [row] * len(found_at)
                taken += found_at
    refuse_unreadable(select, unreadable)
    arrays = [_array(column) for column in zip(*rows, strict=True)] if rows else [pa.nulls(0)] * len(columns)
    answers = outputs.select(added).take(pa.array(taken, pa.int64()))
    return pa.table([*arrays, *answers.columns], names=[*columns, *added])


def _array(values: Sequence[Any]) -> pa.Array:
    """The values in Arrow's type; values of several types, or objects with other fields, are each JSON."""
    if _alike(values):
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            if any(isinstance(value, Nanoseconds) for value in values):
                return _times(values)
            return pa.array(values)
    return pa.array([None if value is None else _json(value) for value in values], pa.string())


def _alike(values: Iterable[Any]) -> bool:
    """Whether one type of Arrow can hold the values.

    Arrow makes a time of a number next to times, a date of a time next to dates, bytes of a text, and gives
    an object the fields of all others.
    """
    there = [value for value in values if value is not None]
    if len({_kind(value) for value in there}) > 1:
        return False
    if there and isinstance(there[0], list | tuple):
        return _alike(chain.from_iterable(there))
    if not there or not isinstance(there[0], Mapping):
        return True
    names = there[0].keys()
    return all(value.keys() == names for value in there) and all(
        _alike(value[name] for value in there) for name in names
    )


def _kind(value: Any) -> Any:
    """Values of one kind can share a column."""
    if isinstance(value, datetime):
        return datetime, value.tzinfo is None
    return float if type(value) in (int, Number) else type(value)


def _times(values: Sequence[datetime | None]) -> pa.Array:
    """Times with nanoseconds; raises `OverflowError` for one that 64 bits do not hold."""
    since = [
        None
        if value is None
        else (value.replace(tzinfo=UTC) - EPOCH if value.tzinfo is None else value - EPOCH)
        // timedelta(microseconds=1)
        * 1000
        + getattr(value, "nanosecond", 0)
        for value in values
    ]
    zone = next(value.tzinfo for value in values if value is not None)
    return pa.array(since, pa.int64()).cast(pa.timestamp("ns", None if zone is None else "UTC"))


def _json(value: Any) -> str:
    """A value as JSON: numbers with their digits, and what JSON lacks as its text; bytes are in base64."""
    if isinstance(value, Mapping):
        pairs = (f"{_json(str(key))}: {_json(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        return json.dumps(base64.b64encode(value).decode())
    plain = value if value is None or isinstance(value, str | bool | int | float) else str(value)
    return json.dumps(plain, ensure_ascii=isinstance(plain, str) and not is_text(plain))
