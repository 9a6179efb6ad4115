"""The outputs table of a database: made once with the source's own key types, written in transactions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer.backends import Backend
from vllm_tasks.datalayer.keyed_table import (
    KINDS,
    KeyedTable,
    Shape,
    refuse_differences,
    refuse_long_names,
    shape_of,
)
from vllm_tasks.datalayer.selection import LATER, OWN_COLUMNS, POSITION, Key, OutputTable, Row
from vllm_tasks.datalayer.storable import last_outputs
from vllm_tasks.errors import InvalidCall

WAY_OUT = "give another predict_id, or drop that table if its answers are not needed"
"""For outputs that are there with other columns."""


def made(table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any], there: Shape) -> sa.Table:
    """The table as SQLAlchemy makes it; where it is `there` from an earlier version, as that made it."""
    absent = LATER - there.keys() if there else frozenset()
    columns = [sa.Column(name, kind, nullable=False) for name, kind in zip(key, key_kinds, strict=True)]
    columns += [sa.Column(column.name, KINDS[column.kind]) for column in table.columns]
    if table.flatten:
        columns.append(sa.Column(POSITION, KINDS["int"]))
    columns += [sa.Column(name, KINDS[kind]) for name, kind in OWN_COLUMNS.items() if name not in absent]
    result = sa.Table(table.name, sa.MetaData(), *columns)
    if table.flatten:
        # An empty list is one row without a position. At 0 any two outcomes of a key meet.
        position = sa.func.coalesce(result.c[POSITION], sa.literal_column("0"))
        name = "_key_" + sha256(table.name.encode()).hexdigest()[:16]
        sa.Index(name, *(result.c[k] for k in key), position, unique=True)
    else:
        result.append_constraint(sa.PrimaryKeyConstraint(*key))
    return result


class DatabaseWriter:
    """`Writer` of one outputs table.

    Of a key that is in one commit twice, as its row came up twice when the source changed under the run,
    the later outcome is kept, whole.
    """

    def __init__(
        self, backend: Backend, table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]
    ) -> None:
        self._backend = backend
        self._key = tuple(key)
        self._refuse_names(table)
        self._table = made(table, key, key_kinds, self._shape_of(table.name))
        self._create()
        json = {column.name for column in table.columns if column.kind == "json"}
        self._keyed = KeyedTable(backend, self._table, key, json)

    def commit(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        for row in rows:
            if problem := self.unstorable(row):
                raise ValueError(f"the key {self._keyed.key_of(row)!r:.200}: {problem}")
        self._keyed.replace(last_outputs(rows, self._key), redo)

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`; `commit` raises ValueError for such a row, before anything is sent."""
        return self._keyed.unstorable(row)

    def close(self) -> None:
        pass

    def _refuse_names(self, table: OutputTable) -> None:
        if table.partition_by or table.compression:
            raise InvalidCall("partition_by and compression are of a lake; a database takes neither")
        columns = [column.name for column in table.columns]
        names = [*self._key, *columns, POSITION, *OWN_COLUMNS]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidCall(
                f"the outputs would have more than one column {twice[0]!r} (of the key "
                f"{', '.join(self._key)}, the output's columns and our own); rename it in a SELECT or in "
                "the output_schema"
            )
        refuse_long_names((table.name, *columns), self._backend.engine.dialect)

    def _create(self) -> None:
        if not self._shape_of(self._table.name):
            try:
                with self._backend.engine.begin() as connection:
                    self._table.create(connection, checkfirst=False)
            except DBAPIError as e:
                if not self._shape_of(self._table.name):  # no rival made it
                    raise self._backend.translated(e) from e
        expected = shape_of(self._table, self._backend.engine.dialect)
        refuse_differences(self._table.name, self._shape_of(self._table.name), expected, WAY_OUT)

    def _shape_of(self, name: str) -> Shape:
        with self._backend.reading() as connection:
            return self._backend.shape(connection, name)
