"""The keys of a database's rows, read in their order, without values, in transactions that are over soon."""

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
"""Rows whose keys are Python objects at once; and of which one has a `Mark`."""
FIRST = 1 << 14
"""Rows of the first query, where each query has a limit."""
TEXTS = 1 << 16
"""Rows of a query at most whose keys of text are packed: those of an index have some kilobytes at most, and
a value of the server's 1 GB."""
SOON = 1.0
"""A query that is over in so many seconds is followed by a larger one."""


@dataclass(frozen=True)
class Mark:
    """A place in the order of the rows."""

    number: int
    """Of the row that comes next."""
    after: Place | None
    """The `Backend.bound` of the row before it; None at the beginning."""


@dataclass
class KeyPart:
    """Keys in the order of their rows."""

    key: pa.Schema
    marks: list[Mark]
    """In their order; the last one is behind all rows."""
    wrong: dict[int, str] = field(default_factory=dict)
    """Why keys of these numbers are none (NULL)."""
    count: int = 0
    nbytes: int = 0
    tables: list[pa.Table] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether there are enough for one part of a source."""
        return self.count >= PART_ROWS or self.nbytes >= PART_BYTES

    def add(self, columns: Sequence[pa.Array], after: Place) -> None:
        """`after`: the bound of the last of these rows."""
        found = pa.table(list(columns), schema=self.key)
        self.tables.append(found)
        self.count += found.num_rows
        self.nbytes += found.nbytes
        self.marks.append(Mark(self.count, after))

    def keys(self) -> pa.Table:
        """All of them."""
        return pa.concat_tables([self.key.empty_table(), *self.tables]).combine_chunks()


class SqlKeys:
    """The keys of a source in their order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._backend = order.backend
        self._key = order.key

    def parts(self) -> Iterator[KeyPart]:
        """All keys."""
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
        """How the server packs each column; None where it does not."""
        columns = [self._backend.packed(sa.column(f"_c{i}"), f.type) for i, f in enumerate(self._key)]
        return [c for c in columns if c] if all(columns) else None

    def _unpack(
        self, connection: Connection, part: KeyPart, packed: list[list[sa.ColumnElement[Any]]], limit: int
    ) -> bool:
        """Add the next keys, of which the server makes one value a column; False: some are NULL or no text.

        An aggregate without an order of its own takes rows as they come, here from an ordered subquery.
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
        """Add the next keys, row by row; True: there are no more.

        A query that took long before its first row is read as long again: else a sort of the whole table
        would be repeated for each few rows.
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
    """The array of what `Backend.packed` gives."""
    if pa.types.is_int64(kind):
        return pa.array(np.frombuffer(values[0], ">i8").astype(np.int64))
    ends = np.frombuffer(values[0], ">i4").cumsum(dtype=np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), ends])
    made = pa.StringArray.from_buffers(count, pa.py_buffer(starts), pa.py_buffer(values[1]))
    made.validate(full=True)
    return made
