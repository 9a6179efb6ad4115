"""Data frames of pandas and polars in Arrow, also with columns that Arrow does not convert itself."""

from __future__ import annotations

import numbers
from datetime import date, datetime
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.storage_errors import plain

REFUSED = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""Errors of pyarrow for values that it does not know."""
ONE_TO_ARROW = ((date, datetime), (str, bytes), (numbers.Real, numbers.Integral))
"""Types of Python that Arrow makes one of: a time would become its date, a text its bytes, 1 would be 1.0. A
value of the second type may be one of the first, too."""


def in_arrow(data: Any) -> tuple[pa.Table, dict[str, str]]:
    """The rows of a data frame or table, and by column why Arrow cannot hold it (such columns are NULL).

    A pandas column may have values of several types, like one from Excel: each value keeps its type. A text
    with half a character (a lone surrogate) fails its row alone. A column is refused only when it is read, so
    that columns which a call does not name do not matter.
    """
    package = type(data).__module__.split(".")[0]
    if package == "polars":
        return _polars_in_arrow(data)
    if package != "pandas":
        return pa.table(data), {}
    if not any(_changed(data.iloc[:, place]) for place in range(data.shape[1])):
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


def _changed(series: Any) -> bool:
    """Whether Arrow would change values of a column: months, and objects that it gives one type."""
    if str(series.dtype) != "object":
        return str(series.dtype).startswith("period")
    kinds = {type(value) for value in series[~series.isna()]}
    return any(
        any(issubclass(kind, other) for kind in kinds)
        and any(issubclass(kind, one) and not issubclass(kind, other) for kind in kinds)
        for one, other in ONE_TO_ARROW
    )


def _column(series: Any) -> pa.Array:
    kind = str(series.dtype)
    if kind.startswith("period"):  # Arrow would store their numbers: 648 for January 2024
        return pa.array(
            [None if missing else str(p) for p, missing in zip(series, series.isna(), strict=True)]
        )
    if kind.startswith("Sparse"):
        series = series.sparse.to_dense()
    try:
        if _changed(series):
            raise TypeError("several types")
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
    children = [_texts(group) if kind is str else pa.array(group) for kind, group in groups.items()]
    if len(children) == 1:
        return children[0]
    return pa.UnionArray.from_dense(pa.array(types, pa.int8()), pa.array(offsets, pa.int32()), children)


def _texts(values: list[str]) -> pa.Array:
    """Texts as Arrow's, also with half a character, which is not UTF-8 and is found when it is read."""
    bytes_of = pa.array([value.encode("utf-8", "surrogatepass") for value in values], pa.large_binary())
    return bytes_of.view(pa.large_string())
