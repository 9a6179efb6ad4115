"""A table, view or SELECT of any database that SQLAlchemy can stream, as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.database.declared import declared, typed
from vllm_tasks.datalayer.database.dialects import backend
from vllm_tasks.datalayer.database.relation import Relation
from vllm_tasks.datalayer.sources import Part, Unreadable, Values
from vllm_tasks.datalayer.sources.arrow import count_unreadable
from vllm_tasks.datalayer.sources.keys import known
from vllm_tasks.datalayer.sources.sql_keys import PAGE, SqlKeys
from vllm_tasks.datalayer.sources.sql_order import Order, Place
from vllm_tasks.datalayer.sources.sql_types import key_array, stored_as
from vllm_tasks.datalayer.sources.sql_values import SqlValues
from vllm_tasks.datalayer.spool import Spool, spools
from vllm_tasks.errors import InvalidCall


class SqlSource:
    """`Source` of a SQLAlchemy URL. Values are those of the driver, as in `Database.rows`.

    Rows are read in the order of their key, in transactions that end before a part is handed on. If an index
    has this order, keys are read alone, and then the values of the wanted rows only.
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
        # The database compares all keys itself, which is faster than reading them.
        with self._backend.reading() as connection:
            source = self._relation(connection)
            source.refuse_bad_keys(connection, key)
            if connection.dialect.name == "sqlite":
                _refuse_merged(connection, source, key)
        return True

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for part in SqlKeys(self._order(key)).parts():
            keys = part.keys()
            yield keys.take(known(keys)) if part.wrong else keys

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        if not key.names:
            yield from self._whole(columns)
            return
        order = self._order(key)
        if not order.indexed:
            yield from self._at_once(order, columns, unreadable)
            return
        values = SqlValues(order, columns, self._converters(columns))
        for part in SqlKeys(order).parts():
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

    def _order(self, key: pa.Schema) -> Order:
        with self._backend.reading() as connection:
            source = self._relation(connection)
            index = source.index(connection, key.names)
            kinds = source.kinds(connection, key.names)
        types = dict(zip(key.names, kinds, strict=True))
        return Order(self._backend, source, key, index or key.names, types, indexed=index is not None)

    def _known(
        self, keys: pa.Table, wrong: dict[int, str], unreadable: Unreadable
    ) -> tuple[pa.Table, np.ndarray]:
        """The keys without NULL, and their numbers; the others go to `unreadable`."""
        kept = known(keys)
        if len(kept) < keys.num_rows:
            count_unreadable(keys, wrong, kept, unreadable, self._backend.where())
            keys = keys.take(pa.array(kept))
        return keys, kept

    def _at_once(self, order: Order, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        """Parts of rows that no index can find again: keys and values are read together."""
        convert = self._converters(columns)
        width = slice(len(order.key), len(order.key) + len(columns))

        def query(_: Connection, after: Place | None) -> sa.Select[Any]:
            return order.query(columns, after)

        for spool in spools(self._backend, query, len(order.columns), PAGE):
            keys, kept = self._known(*_keys(spool, order.key), unreadable)
            yield Part(keys, _reader(spool, kept, width, convert))

    def _whole(self, columns: Sequence[str]) -> Iterator[Part]:
        """All rows without keys, in one transaction: there is no order by which a second one could resume."""
        source, convert = self._relation(), self._converters(columns)
        query = source.query(*(source.rows.c[name].label(f"_c{i}") for i, name in enumerate(columns)))
        with closing(Spool(PAGE)) as spool:
            with self._backend.reading() as connection:
                spool.fill(connection, query, all_rows=True)
            every = np.arange(spool.rows)
            read = _reader(spool, every, slice(0, len(columns)), convert)
            yield Part(pa.table({}), read, rows=spool.rows)

    def _converters(self, columns: Sequence[str]) -> list[str]:
        """The declared type by which each column's values are converted, see `typed`."""
        with self._backend.reading() as connection:
            source = self._relation(connection)
            if connection.dialect.name == "sqlite":
                return declared(connection, source.table, columns)
            kinds = self._backend.types(connection, source.rows, columns)
        return ["JSON" if isinstance(kind, sa.JSON) else "" for kind in kinds]


def _refuse_merged(connection: Connection, source: Relation, key: Sequence[str]) -> None:
    """Refuse keys that differ only in type: SQLite distinguishes 1 and '1', but as text they are the same."""
    columns = [source.rows.c[name] for name in key]
    types = connection.execute(source.query(*map(sa.func.typeof, columns)).distinct().limit(2)).all()
    if len(types) < 2:
        return
    texts = [sa.cast(column, sa.Text) for column in columns]
    merged = source.query(*texts).group_by(*texts).having(sa.func.count() > 1).limit(1)
    if row := connection.execute(merged).first():
        display = ", ".join(f"{name}={value!r:.100}" for name, value in zip(key, row, strict=True))
        raise InvalidCall(
            f"the key {', '.join(key)} has values of several types that are the same as text, for example "
            f"{display}; give each row a unique key, or give another primary_id"
        )


def _reader(spool: Spool, kept: np.ndarray, width: slice, kinds: Sequence[str]) -> Any:
    """`Part.values` for a spool; the rows with the numbers `kept` are in the part."""

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
    """The keys in a spool, and by row number why some do not fit (NULL)."""
    pages: list[list[pa.Array]] = [[] for _ in key]
    wrong: dict[int, str] = {}
    first = 0
    for page in spool.pages():
        for i, field in enumerate(key):
            pages[i].append(key_array([row[i] for row in page], field, wrong, first))
        first += len(page)
    columns = [pa.chunked_array(arrays, field.type) for arrays, field in zip(pages, key, strict=True)]
    return pa.table(columns, schema=key).combine_chunks(), wrong
