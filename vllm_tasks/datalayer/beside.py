"""Joins source rows with their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer import exact_json
from vllm_tasks.datalayer.all_rows import refuse_missing, refuse_unreadable
from vllm_tasks.datalayer.selection import POSITION, Key
from vllm_tasks.datalayer.sources import Source, Unreadable
from vllm_tasks.datalayer.sources.keys import listed
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
    """The values in Arrow's type; values of several types, which JSON allows, are each written as JSON."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else exact_json.dumps(value) for value in values])
