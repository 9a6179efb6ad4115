"""The keys of a database's rows, read in their order and without values, in short transactions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.sources import PART_BYTES, PART_ROWS
from vllm_tasks.datalayer.sources.sql_order import Order, Place
from vllm_tasks.datalayer.sources.sql_types import key_array
from vllm_tasks.datalayer.spool import LONGEST

PAGE = 1000
"""Rows whose keys are held as Python objects at once; each page has a `Mark`."""
FIRST = 1 << 14
"""Rows of the first query, if each query has a limit."""
TEXTS = 1 << 16
"""Maximum rows of a query with packed text keys: a key in an index has some kilobytes at most, and a value of
the server has 1 GB at most."""
SOON = 1.0
"""A query that ends within this many seconds is followed by a larger one."""


@dataclass(frozen=True)
class Mark:
    """A position in the order of the rows."""

    number: int
    """The number of the next row."""
    after: Place | None
    """The `Backend.bound` of the row before it; None at the beginning."""


@dataclass
class KeyPart:
    """Keys in the order of their rows."""

    key: pa.Schema
    marks: list[Mark]
    """Positions in their order; the last one is after all rows."""
    wrong: dict[int, str] = field(default_factory=dict)
    """By number, why a key does not fit (NULL)."""
    count: int = 0
    nbytes: int = 0
    tables: list[pa.Table] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether there are enough keys for one part of a source."""
        return self.count >= PART_ROWS or self.nbytes >= PART_BYTES

    def add(self, columns: Sequence[pa.Array], after: Place) -> None:
        """Add keys; `after` is the bound of the last of these rows."""
        found = pa.table(list(columns), schema=self.key)
        self.tables.append(found)
        self.count += found.num_rows
        self.nbytes += found.nbytes
        self.marks.append(Mark(self.count, after))

    def keys(self) -> pa.Table:
        """All keys of the part."""
        return pa.concat_tables([self.key.empty_table(), *self.tables]).combine_chunks()


class SqlKeys:
    """The keys of a source in their order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._backend = order.backend
        self._key = order.key

    def parts(self) -> Iterator[KeyPart]:
        """All keys, in parts."""
        packed = self._packed() if self._order.indexed else None
        limited = packed is not None or not self._backend.leaves_results
        most = TEXTS if any(pa.types.is_string(f.type) for f in self._key) else PART_ROWS
        part = KeyPart(self._key, [Mark(0, None)])
        limit = min(FIRST, most)
        while True:
            with self._backend.reading() as connection:
                began, before = time.monotonic(), part.count
                if packed is None or not self._unpack(connection, part, packed, limit):
                    complete = self._stream(connection, part, limit if limited else None)
                else:
                    complete = part.count - before < limit
                taken = time.monotonic() - began
            if part.full or complete:
                yield part
                part = KeyPart(self._key, [Mark(0, part.marks[-1].after)])
            if complete:
                return
            limit = (
                min(limit * 4, most) if taken < SOON else max(PAGE, limit // 2 if taken > LONGEST else limit)
            )

    def _packed(self) -> list[list[sa.ColumnElement[Any]]] | None:
        """The server's aggregates that pack each column; None if it has none."""
        columns = [self._backend.packed(sa.column(f"_c{i}"), f.type) for i, f in enumerate(self._key)]
        return [c for c in columns if c] if all(columns) else None

    def _unpack(
        self, connection: Connection, part: KeyPart, packed: list[list[sa.ColumnElement[Any]]], limit: int
    ) -> bool:
        """Add the next keys, packed by the server into few values; False if some are NULL or not text.

        An aggregate without an ORDER BY takes rows in the order of its input, here an ordered subquery.
        """
        rows = self._order.query((), part.marks[-1].after).limit(limit).subquery("k")
        counts = [sa.func.count(sa.column(f"_c{i}")) for i in range(len(self._key))]
        found = connection.execute(
            sa.select(sa.func.count(), *counts, *chain(*packed)).select_from(rows)
        ).one()
        count, values = found[0], list(found[1 + len(counts) :])
        if any(some != count for some in found[1 : 1 + len(counts)]):
            return False
        if not count:
            return True
        try:
            columns = [
                _array(f.type, [values.pop(0) for _ in own], count)
                for f, own in zip(self._key, packed, strict=True)
            ]
        except pa.ArrowInvalid:  # a database without an encoding
            return False
        last = {f.name: column[-1].as_py() for f, column in zip(self._key, columns, strict=True)}
        part.add(columns, [str(last[name]) for name in self._order.columns])
        return True

    def _stream(self, connection: Connection, part: KeyPart, limit: int | None) -> bool:
        """Add the next keys, row by row; returns whether there are no more.

        If a query took long before its first row, rows are read for at least as long: otherwise a sort of the
        complete table would be repeated for every few rows.
        """
        began, first, before = time.monotonic(), 0.0, part.count
        streaming = connection.execution_options(stream_results=True, max_row_buffer=1)
        width = len(self._key)
        with streaming.execute(self._order.query((), part.marks[-1].after).limit(limit)) as result:
            while page := result.fetchmany(PAGE):
                now = time.monotonic()
                first = first or now
                arrays = [
                    key_array([row[i] for row in page], f, part.wrong, part.count)
                    for i, f in enumerate(self._key)
                ]
                part.add(arrays, tuple(page[-1][width:]))
                reading = now - first
                if limit is None and (reading >= LONGEST or (part.full and reading >= first - began)):
                    return False
        return limit is None or part.count - before < limit


def _array(kind: pa.DataType, values: Sequence[bytes], count: int) -> pa.Array:
    """The array that `Backend.packed` has packed."""
    if pa.types.is_int64(kind):
        return pa.array(np.frombuffer(values[0], ">i8").astype(np.int64))
    ends = np.frombuffer(values[0], ">i4").cumsum(dtype=np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), ends])
    made = pa.StringArray.from_buffers(count, pa.py_buffer(starts), pa.py_buffer(values[1]))
    made.validate(full=True)
    return made
