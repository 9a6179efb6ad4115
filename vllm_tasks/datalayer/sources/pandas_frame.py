"""Data frames of pandas and polars in Arrow, also with columns that Arrow does not convert itself."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.storage_errors import plain

REFUSED = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""Errors of pyarrow for values that it does not know."""


def in_arrow(data: Any) -> tuple[pa.Table, dict[str, str]]:
    """The rows of a data frame or table, and by column why Arrow cannot hold it (such columns are NULL).

    A pandas column may have values of several types, like one from Excel: each value keeps its type. A column
    is refused only when it is read, so that columns which a call does not name do not matter.
    """
    package = type(data).__module__.split(".")[0]
    if package == "polars":
        return _polars_in_arrow(data)
    if package != "pandas":
        return pa.table(data), {}
    if not any(str(kind).startswith("period") for kind in data.dtypes):
        try:
            return pa.table(data), {}
        except REFUSED:
            pass  # perhaps because of one column among many
    arrays, problems = [], {}
    names = [str(name) for name in data.columns]
    for place, name in enumerate(names):
        try:
            arrays.append(_column(data.iloc[:, place]))
        except REFUSED as error:
            arrays.append(pa.nulls(len(data)))
            problems[name] = plain(error)
    return pa.Table.from_arrays(arrays, names=names), problems


def _polars_in_arrow(data: Any) -> tuple[pa.Table, dict[str, str]]:
    problems = {}
    for name, kind in data.schema.items():
        if str(kind) == "Object":  # polars would export addresses in memory
            problems[name] = "it has Python objects"
            continue
        try:
            pa.table(data.select(name).head(0))
        except REFUSED as error:  # such as a whole number of 128 bits
            problems[name] = plain(error)
    if not problems:
        return pa.table(data), {}
    usual = pa.table(data.drop(list(problems)))
    columns = [pa.nulls(len(data)) if name in problems else usual[name] for name in data.columns]
    return pa.Table.from_arrays(columns, names=data.columns), problems


def _column(series: Any) -> pa.Array:
    kind = str(series.dtype)
    if kind.startswith("period"):  # Arrow would store their numbers: 648 for January 2024
        return pa.array(
            [None if missing else str(p) for p, missing in zip(series, series.isna(), strict=True)]
        )
    if kind.startswith("Sparse"):
        series = series.sparse.to_dense()
    try:
        found = pa.array(series, from_pandas=True)
    except REFUSED:
        if kind != "object":
            raise
        return _mixed([None if missing else v for v, missing in zip(series, series.isna(), strict=True)])
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _mixed(values: list[Any]) -> pa.Array:
    """Values of several types as a union; raises Arrow's error for a type that it lacks."""
    groups: dict[type, list[Any]] = {}
    types, offsets = [], []
    for value in values:
        group = groups.setdefault(type(value), [])
        types.append(list(groups).index(type(value)))
        offsets.append(len(group))
        group.append(value)
    children = [pa.array(group) for group in groups.values()]
    return pa.UnionArray.from_dense(pa.array(types, pa.int8()), pa.array(offsets, pa.int32()), children)
