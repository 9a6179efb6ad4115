"""Values of some rows of an indexed table, found by the keys that were read before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.database.declared import typed
from vllm_tasks.datalayer.sources import Values
from vllm_tasks.datalayer.sources.keys import listed
from vllm_tasks.datalayer.sources.sql_keys import PAGE, KeyPart, Mark
from vllm_tasks.datalayer.sources.sql_order import Order
from vllm_tasks.datalayer.sources.sql_types import key_array
from vllm_tasks.datalayer.spool import spools

LISTED = 4096
"""Maximum number of keys in one query."""

Numbered = list[tuple[int, Values]]


class SqlValues:
    """Reads the columns `columns` of rows by their numbers in a part."""

    def __init__(self, order: Order, columns: Sequence[str], convert: Sequence[str]) -> None:
        """`convert` has the declared type of each column, see `typed`."""
        self._order = order
        self._backend = order.backend
        self._key = order.key
        self._columns = columns
        self._convert = convert

    def of(self, part: KeyPart, keys: pa.Table, kept: np.ndarray) -> Callable[[Sequence[int]], Any]:
        """`Part.values` of a part with these `keys`, which have the numbers `kept` in `part`."""

        def values(rows: Sequence[int]) -> Iterator[list[Values | None]]:
            wanted = np.asarray(rows, dtype=np.int64)
            found = (
                self._by_list(keys, wanted)
                if self._backend.lists
                else self._by_range(part.marks, keys, kept, wanted)
            )
            yield from _with_gaps(found, wanted)

        return values

    def _by_list(self, keys: pa.Table, wanted: np.ndarray) -> Iterator[Numbered]:
        """Find rows by a list of their keys, however far apart they are."""
        rows = self._order.source.rows
        for start in range(0, len(wanted), LISTED):
            some = wanted[start : start + LISTED]
            kinds = [self._order.kinds[name] for name in self._key.names]
            ids = self._backend.key_rows(kinds, listed(keys, some))
            *there, number = ids.c
            on = [rows.c[name] == c for name, c in zip(self._key.names, there, strict=True)]
            wide = [rows.c[name].label(f"_c{i}") for i, name in enumerate(self._columns)]
            query = sa.select(*wide, number.label("_n")).select_from(ids.join(rows, sa.and_(*on)))

            def left(
                _: Connection, after: Sequence[Any] | None, query: Any = query, number: Any = number
            ) -> Any:
                return (query if after is None else query.where(number > after[0])).order_by(number)

            for spool in spools(self._backend, left, 1, PAGE):
                for page in spool.pages():
                    yield [(int(some[row[-1] - 1]), self._typed(row[:-1])) for row in page]

    def _by_range(
        self, marks: Sequence[Mark], keys: pa.Table, kept: np.ndarray, wanted: np.ndarray
    ) -> Iterator[Numbered]:
        """Find rows by ranges between marks: of each 1,000 rows, all or none are read."""
        width = slice(len(self._key), len(self._key) + len(self._columns))
        for some, start, end in _runs(marks, kept, wanted):
            numbers = dict(zip(listed(keys, some), some.tolist(), strict=True))

            def between(
                _: Connection, after: Sequence[Any] | None, start: Any = start, end: Any = end
            ) -> Any:
                rows = self._order.query(self._columns, start if after is None else after)
                return rows if end is None else rows.where(sa.not_(self._order.behind(end)))

            for spool in spools(self._backend, between, len(self._order.columns), PAGE):
                for page in spool.pages():
                    columns = [
                        key_array([r[i] for r in page], f, {}).to_pylist() for i, f in enumerate(self._key)
                    ]
                    there = map(numbers.get, zip(*columns, strict=True))
                    yield [
                        (n, self._typed(r[width])) for n, r in zip(there, page, strict=True) if n is not None
                    ]

    def _typed(self, row: Values) -> Values:
        return tuple(map(typed, row, self._convert))


def _runs(
    marks: Sequence[Mark], kept: np.ndarray, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, Any, Any]]:
    """The wanted rows in runs of neighbouring marks: rows, the place before them, the place after them."""
    starts = np.array([mark.number for mark in marks[:-1]])
    at = np.searchsorted(starts, kept[wanted], side="right") - 1
    for rows in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(at) > 1) + 1):
        if len(rows):
            yield wanted[rows], marks[at[rows[0]]].after, marks[at[rows[-1]] + 1].after


def _with_gaps(pages: Iterator[Numbered], wanted: np.ndarray) -> Iterator[list[Values | None]]:
    """The values of the wanted rows in their order; None for a row that was removed."""
    at = 0
    for page in pages:
        found: list[Values | None] = []
        for number, row in page:
            behind = int(np.searchsorted(wanted, number))
            found += [None] * (behind - at) + [row]
            at = behind + 1
        if found:
            yield found
    if at < len(wanted):
        yield [None] * (len(wanted) - at)
