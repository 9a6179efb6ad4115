"""The outputs table of a database: created once with the source's key types, written in transactions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer.database.backends import Backend, Shape, TableName
from vllm_tasks.datalayer.database.keyed_table import (
    KINDS,
    KeyedTable,
    refuse_differences,
    refuse_long_names,
    shape_of,
)
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION, Key, OutputTable, Row
from vllm_tasks.datalayer.storable import last_outputs
from vllm_tasks.errors import InvalidCall

logger = logging.getLogger(__name__)

WAY_OUT = "give another predict_id, or drop that table if its answers are not needed"
"""The way out when outputs exist with other columns."""


def made(place: TableName, table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]) -> sa.Table:
    """The table as SQLAlchemy creates it."""
    columns = [sa.Column(name, kind, nullable=False) for name, kind in zip(key, key_kinds, strict=True)]
    columns += [sa.Column(column.name, KINDS[column.kind]) for column in table.columns]
    if table.flatten:
        columns.append(sa.Column(POSITION, KINDS["int"]))
    columns += [sa.Column(name, KINDS[kind]) for name, kind in OWN_COLUMNS.items()]
    result = sa.Table(place.name, sa.MetaData(), *columns, schema=place.schema)
    if table.flatten:
        # An empty list is one row without a position. It counts as position 0, so that any two outcomes of
        # one key, committed by concurrent writers, conflict in the index.
        position = sa.func.coalesce(result.c[POSITION], sa.literal_column("0"))
        name = "_key_" + sha256(place.name.encode()).hexdigest()[:16]
        sa.Index(name, *(result.c[k] for k in key), position, unique=True)
    else:
        result.append_constraint(sa.PrimaryKeyConstraint(*key))
    return result


def refuse_shape(
    backend: Backend, place: TableName, shape: Shape, key: Sequence[str], key_kinds: Sequence[Any]
) -> None:
    """Raise `InvalidCall` if existing outputs have another key; their other columns do not matter."""
    expected = shape_of(made(place, OutputTable(place.name, ()), key, key_kinds), backend.engine.dialect)
    known = {name: column for name, column in shape.items() if name in expected}
    narrow = _narrow(backend, known, expected, key)
    refuse_differences(backend, place.full, {**known, **narrow}, expected, WAY_OUT)


def refuse_outputs(
    backend: Backend, table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]
) -> None:
    """Raise `InvalidCall` for what a `DatabaseWriter` would refuse; nothing is created or widened."""
    with backend.reading() as connection:
        place = backend.located(connection, table.name)
        there = backend.shape(connection, place)
    _refuse_names(backend, place, table, key)
    if there:
        expected = shape_of(made(place, table, key, key_kinds), backend.engine.dialect)
        there = {**there, **_narrow(backend, there, expected, key)}
        refuse_differences(backend, place.full, there, expected, WAY_OUT)


def _refuse_names(backend: Backend, place: TableName, table: OutputTable, key: Sequence[str]) -> None:
    if table.partition_by or table.compression:
        raise InvalidCall("partition_by and compression are options of a lake; a database has neither")
    columns = [column.name for column in table.columns]
    names = [*key, *columns, POSITION, *OWN_COLUMNS]
    fold = str.casefold if backend.engine.dialect.name == "sqlite" else str
    counts = Counter(map(fold, names))
    if twice := sorted(name for name in names if counts[fold(name)] > 1):
        raise InvalidCall(
            f"the outputs would have more than one column {twice[0]!r} (of the key "
            f"{', '.join(key)}, the output's columns and our own); rename it in a SELECT "
            "(SELECT ... AS another_name) or in the output_schema"
        )
    refuse_long_names((place.name, *columns), backend.engine.dialect)


def _narrow(backend: Backend, there: Shape, expected: Shape, key: Sequence[str]) -> Shape:
    """The expected key columns that are narrower in the outputs, since the source's key was widened."""
    return {
        name: expected[name]
        for name in key
        if name in there
        and not backend.holds(there[name].kind, expected[name].kind)
        and backend.holds(expected[name].kind, there[name].kind)
    }


class DatabaseWriter:
    """`Writer` of one outputs table.

    If one commit has a key twice, because the source changed during the run and its row came up twice, the
    later outcome is kept completely.
    """

    def __init__(
        self, backend: Backend, table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]
    ) -> None:
        self._backend = backend
        self._key = tuple(key)
        with backend.reading() as connection:
            self._place = backend.located(connection, table.name)
        _refuse_names(backend, self._place, table, key)
        self._table = made(self._place, table, key, key_kinds)
        self._create([column.name for column in table.columns if column.kind == "vector"])
        json = {column.name for column in table.columns if column.kind == "json"}
        self._keyed = KeyedTable(backend, self._table, key, json, in_place=self._may_update(table))

    def commit(
        self, rows: Sequence[Row], redo: Collection[Key], before: Callable[[], None] | None = None
    ) -> None:
        for row in rows:
            if problem := self.unstorable(row):
                raise ValueError(f"the key {self._keyed.key_of(row)!r:.200}: {problem}")
        try:
            self._keyed.replace(last_outputs(rows, self._key), redo, before=before)
        except InvalidCall as e:
            if self._shape():
                raise
            raise InvalidCall(
                f"the outputs {self._place.full!r} were dropped or renamed during the run ({e}); rename them "
                "back, or run it again to create new ones"
            ) from e

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`; `commit` raises ValueError for such a row, before anything is sent."""
        return self._keyed.unstorable(row)

    def close(self) -> None:
        pass

    def _create(self, vectors: Sequence[str]) -> None:
        if not self._shape():
            try:
                with self._backend.engine.begin() as connection:
                    self._table.create(connection, checkfirst=False)
                    if vectors and (own := self._backend.vector_type(connection)):
                        connection.exec_driver_sql(self._altered(dict.fromkeys(vectors, own)))
            except DBAPIError as e:
                if not self._shape():  # otherwise a concurrent writer created it
                    raise self._backend.translated(e) from e
        expected = shape_of(self._table, self._backend.engine.dialect)
        there = self._shape()
        if narrow := _narrow(self._backend, there, expected, self._key):
            self._widen(narrow)
            there = self._shape()
        refuse_differences(self._backend, self._place.full, there, expected, WAY_OUT)

    def _widen(self, columns: Shape) -> None:
        """Widen the outputs' key as the source's key was: it could not hold every new key otherwise."""
        dialect = self._backend.engine.dialect
        statement = self._altered({name: self._table.c[name].type.compile(dialect) for name in columns})
        logger.info("the key of the source was widened: %s", statement)
        try:
            with self._backend.writing(self._place.name) as connection:
                connection.exec_driver_sql(statement)
        except DBAPIError as e:
            error = self._backend.translated(e)
            if isinstance(error, InvalidCall):
                raise InvalidCall(f"{error}; the outputs' owner must run: {statement}") from e
            raise error from e

    def _altered(self, specs: Mapping[str, str]) -> str:
        """The statement that gives columns the types `specs`."""
        quote = self._backend.engine.dialect.identifier_preparer
        types = ", ".join(f"ALTER COLUMN {quote.quote_identifier(n)} TYPE {specs[n]}" for n in specs)
        return f"ALTER TABLE {quote.format_table(self._table)} {types}"

    def _may_update(self, table: OutputTable) -> bool:
        """Whether rows may be updated in place, so that values in columns added by others stay."""
        if table.flatten:
            return False
        with self._backend.reading() as connection:
            indexes = self._backend.unique(connection, self._place)
            return {*self._key} in map(set, indexes) and self._backend.may_update(connection, self._place)

    def _shape(self) -> Shape:
        with self._backend.reading() as connection:
            return self._backend.shape(connection, self._place)
