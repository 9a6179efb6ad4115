"""A table, a view or a SELECT of any database that SQLAlchemy can stream, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.backends import Backend
from vllm_tasks.datalayer.declared import declared, typed
from vllm_tasks.datalayer.dialects import backend
from vllm_tasks.datalayer.relation import Relation
from vllm_tasks.datalayer.sources import Part, Unreadable, Values
from vllm_tasks.datalayer.sources.arrow import tell
from vllm_tasks.datalayer.sources.keys import known
from vllm_tasks.datalayer.sources.sql_keys import PAGE, SqlKeys
from vllm_tasks.datalayer.sources.sql_types import key_array, stored_as
from vllm_tasks.datalayer.sources.sql_values import SqlValues
from vllm_tasks.datalayer.spool import Spool, spools


class SqlSource:
    """`Source` of a SQLAlchemy URL. Values are as the driver gives them, as `Database.rows` has them.

    Rows are read in the order of their key, in transactions that are over before a part is handed on. Where
    an index has this order, keys are read alone, and then values of the wanted rows only.
    """

    def __init__(self, url: str, select: str) -> None:
        self._backend: Backend = backend(url)
        self._select = select
        self._found: Relation | None = None

    def columns(self) -> Sequence[str]:
        return self._relation().columns

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        with self._backend.reading() as connection:
            kinds = self._relation(connection).kinds(connection, key)
            return [
                stored_as(kind, spec)
                for kind, spec in zip(kinds, self._backend.plain(connection, kinds), strict=True)
            ]

    def identified_by(self, key: Sequence[str]) -> bool:
        # Where the rows are, all keys are compared sooner than they come here.
        with self._backend.reading() as connection:
            self._relation(connection).refuse_bad_keys(connection, key)
        return True

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        order, kinds, indexed = self._order(key)
        reader = SqlKeys(self._backend, self._relation(), key, order, [kinds[name] for name in order])
        for part in reader.parts(indexed=indexed):
            yield part.keys()

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        if not key.names:
            yield from self._whole(columns)
            return
        order, kinds, indexed = self._order(key)
        place = (order, [kinds[name] for name in order])
        if not indexed:
            yield from self._at_once(key, place, columns, unreadable)
            return
        convert = self._converters(columns)
        values = SqlValues(self._backend, self._relation(), key, order, kinds, columns, convert)
        for part in SqlKeys(self._backend, self._relation(), key, *place).parts(indexed=True):
            keys, kept = self._known(part.keys(), part.wrong, unreadable)
            yield Part(keys, values.of(part, keys, kept))

    def close(self) -> None:
        self._backend.close()

    def _relation(self, connection: Connection | None = None) -> Relation:
        if self._found is None:
            if connection is None:
                with self._backend.reading() as own:
                    return self._relation(own)
            self._found = Relation.of(self._backend, connection, self._select, ())
        return self._found

    def _order(self, key: pa.Schema) -> tuple[Sequence[str], dict[str, Any], bool]:
        """In which order rows are read; the types of the key's columns; whether an index has this order."""
        with self._backend.reading() as connection:
            source = self._relation(connection)
            index = source.index(connection, key.names)
            kinds = source.kinds(connection, key.names)
        return index or key.names, dict(zip(key.names, kinds, strict=True)), index is not None

    def _known(
        self, keys: pa.Table, wrong: dict[int, str], unreadable: Unreadable
    ) -> tuple[pa.Table, np.ndarray]:
        """The keys without NULL in them, and their numbers; the others go to `unreadable`."""
        kept = known(keys)
        if len(kept) < keys.num_rows:
            tell(keys, wrong, kept, unreadable, self._backend.where())
            keys = keys.take(pa.array(kept))
        return keys, kept

    def _at_once(
        self,
        key: pa.Schema,
        place: tuple[Sequence[str], Sequence[Any]],
        columns: Sequence[str],
        unreadable: Unreadable,
    ) -> Iterator[Part]:
        """Rows that no index finds again, of which keys and values are read together."""
        convert = self._converters(columns)
        width = slice(len(key.names), len(key.names) + len(columns))
        for spool in self._spools(key, place, columns):
            keys, kept = self._known(*_keys(spool, key), unreadable)
            yield Part(keys, _reader(spool, kept, width, convert))

    def _spools(
        self, key: pa.Schema, place: tuple[Sequence[str], Sequence[Any]], columns: Sequence[str]
    ) -> Iterator[Spool]:
        """Rows of the key, the columns, and the place in the order."""
        source, (order, kinds) = self._relation(), place
        ordered = [source.rows.c[name] for name in order]
        found = [self._backend.as_key(source.rows.c[field.name], field.type) for field in key]
        found += [source.rows.c[name] for name in columns]
        found += self._backend.bound(ordered)

        def query(_: Connection, after: Sequence[Any] | None) -> sa.Select[Any]:
            rows = source.query(*(c.label(f"_c{i}") for i, c in enumerate(found))).order_by(*ordered)
            return rows if after is None else rows.where(self._backend.after(ordered, kinds, after))

        return spools(self._backend, query, len(order), PAGE)

    def _whole(self, columns: Sequence[str]) -> Iterator[Part]:
        """All rows, in no order that they could be found by again: in one transaction."""
        source, convert = self._relation(), self._converters(columns)
        query = source.query(*(source.rows.c[name].label(f"_c{i}") for i, name in enumerate(columns)))
        with closing(Spool(PAGE)) as spool:
            with self._backend.reading() as connection:
                spool.fill(connection, query, whole=True)
            every = np.arange(spool.rows)
            read = _reader(spool, every, slice(0, len(columns)), convert)
            yield Part(pa.table({}), read, rows=spool.rows)

    def _converters(self, columns: Sequence[str]) -> list[str]:
        """By which declared type each column's values are read."""
        with self._backend.reading() as connection:
            source = self._relation(connection)
            if connection.dialect.name == "sqlite":
                return declared(connection, source.table, columns)
            kinds = self._backend.types(connection, source.rows, columns)
        return ["JSON" if isinstance(kind, sa.JSON) else "" for kind in kinds]


def _reader(spool: Spool, kept: np.ndarray, width: slice, kinds: Sequence[str]) -> Any:
    """`Part.values` of the rows in a spool, of which those with the numbers `kept` are in the part."""

    def values(rows: Sequence[int]) -> Iterator[list[Values]]:
        wanted = set(kept[np.asarray(rows, dtype=np.int64)].tolist())
        first = 0
        for page in spool.pages():
            found = [tuple(map(typed, row[width], kinds)) for i, row in enumerate(page, first) if i in wanted]
            first += len(page)
            if found:
                yield found

    return values


def _keys(spool: Spool, key: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """The keys in a spool, and why some are none (NULL)."""
    pages: list[list[pa.Array]] = [[] for _ in key]
    wrong: dict[int, str] = {}
    first = 0
    for page in spool.pages():
        for i, field in enumerate(key):
            pages[i].append(key_array([row[i] for row in page], field, wrong, first))
        first += len(page)
    columns = [pa.chunked_array(arrays, field.type) for arrays, field in zip(pages, key, strict=True)]
    return pa.table(columns, schema=key).combine_chunks(), wrong
