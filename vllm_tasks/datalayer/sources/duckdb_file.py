"""A table, a view or a SELECT of a file that DuckDB keeps, as a source: `duckdb:///file.duckdb`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.relation import STATEMENT
from vllm_tasks.datalayer.sources import Part, Unreadable
from vllm_tasks.datalayer.sources.arrow import part_of, values_of
from vllm_tasks.datalayer.sources.keys import cast_keys, key_type
from vllm_tasks.errors import InvalidCall, TablesUnavailable, near

SCHEME = "duckdb:///"
BATCH = 2048
"""Rows of a part; DuckDB's own vectors have as many."""


class DuckDBSource:
    """`Source` of a DuckDB file, which is opened read-only; a SELECT reaches no other file."""

    def __init__(self, url: str, select: str) -> None:
        name = url.removeprefix(SCHEME)
        if name == url or not name or "?" in name:
            raise InvalidCall(f"a DuckDB file is written {SCHEME}path/to/file.duckdb, without options")
        self._path = Path(name).expanduser().absolute()
        if not self._path.is_file():
            raise InvalidCall(f"there is no DuckDB file {str(self._path)!r}")
        self._select = select.strip()
        self._connection = self._opened()
        self._rows = self._named()

    def columns(self) -> Sequence[str]:
        return list(self._schema([]).names)

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        return [key_type(field.name, field.type) for field in self._schema(key)]

    def identified_by(self, key: Sequence[str]) -> bool:
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for batch in self._batches(key.names):
            yield cast_keys(pa.Table.from_batches([batch]), key)[0]

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        names = list(dict.fromkeys((*key.names, *columns)))
        for batch in self._batches(names):
            if key.names:
                yield part_of(batch, key, columns, unreadable, str(self._path))
            else:
                yield Part(pa.table({}), _values(batch, columns), rows=batch.num_rows)

    def close(self) -> None:
        self._connection.close()

    def _opened(self) -> Any:
        import duckdb

        try:
            connection = duckdb.connect(str(self._path), read_only=True)
        except duckdb.IOException as e:
            if "lock" in str(e):  # a process that writes it lets nobody else read
                raise TablesUnavailable(f"{self._path}: {str(e)[:300]}") from e
            raise InvalidCall(f"{str(self._path)!r} is no file of DuckDB's: {str(e)[:300]}") from e
        connection.execute("SET enable_external_access = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET arrow_lossless_conversion = true")  # JSON and UUIDs are told from texts
        connection.execute("SET lock_configuration = true")
        return connection

    def _named(self) -> str:
        """SQL of the rows that the select names."""
        found = self._connection.sql(
            "SELECT table_schema, table_name FROM information_schema.tables"
        ).fetchall()
        there = {name: (schema, name) for schema, name in found}
        there.update({f"{schema}.{name}": (schema, name) for schema, name in found})
        if (place := there.get(self._select)) is not None:
            return ".".join(map(_quoted, place))
        if not STATEMENT.match(self._select):
            raise InvalidCall(
                f"select={self._select[:200]!r} is no table or view of {str(self._path)!r} and no SELECT"
                f"{near(self._select, list(there))}"
            )
        statements = self._parsed()
        if len(statements) != 1:
            raise InvalidCall("select must be exactly one SELECT statement")
        return f"({statements[0].query.rstrip().rstrip(';')}\n)"

    def _parsed(self) -> list[Any]:
        import duckdb

        try:
            return list(duckdb.extract_statements(self._select))
        except duckdb.Error as e:
            raise InvalidCall(f"select must be exactly one SELECT statement that runs: {str(e)[:300]}") from e

    def _query(self, names: Sequence[str], end: str = "") -> Any:
        import duckdb

        wanted = ", ".join(map(_quoted, names)) or "*"
        # A cursor of its own: a query that is read in batches ends with the next one on its connection.
        try:
            return self._connection.cursor().sql(f"SELECT {wanted} FROM {self._rows} {end}")  # noqa: S608
        except duckdb.Error as e:
            raise InvalidCall(f"{str(self._path)!r} refuses the select: {str(e)[:300]}") from e

    def _schema(self, names: Sequence[str]) -> pa.Schema:
        reader = self._query(names, "LIMIT 0").to_arrow_reader(1)
        schema: pa.Schema = reader.schema
        reader.close()
        return schema

    def _batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        import duckdb

        try:
            yield from self._query(names).to_arrow_reader(BATCH)
        except (duckdb.Error, pa.ArrowException) as e:
            raise InvalidCall(f"{str(self._path)!r} cannot be read: {str(e)[:300]}") from e


def _values(batch: pa.RecordBatch, columns: Sequence[str]) -> Any:
    return lambda rows: values_of(batch, columns, rows)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
