"""A lake: a folder or an fsspec URL, read by DuckDB, with outputs as Delta tables."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import duckdb
import fsspec
import pyarrow as pa
from deltalake import DeltaTable
from fsspec.implementations.local import LocalFileSystem

from vllm_tasks.datalayer.delta import (
    arrow_column,
    arrow_schema,
    dataset,
    filterable,
    find_table,
    make_table,
    quoted,
    storage_errors,
    table_schema,
    writer_properties,
)
from vllm_tasks.datalayer.delta_writer import DeltaWriter
from vllm_tasks.datalayer.put import WAY_OUT, checked
from vllm_tasks.datalayer.selection import (
    LATER,
    OWN_COLUMNS,
    PAGE,
    POSITION,
    Key,
    OutputTable,
    Row,
    Selection,
    SourceRow,
    Writer,
)
from vllm_tasks.datalayer.sources import VIEW, Files, Source, exactly, literal, reading
from vllm_tasks.errors import InvalidCall, TablesUnavailable, near
from vllm_tasks.places import without_secrets

logger = logging.getLogger(__name__)

MEMORY = "300MB"
"""DuckDB's; what it needs beyond is spilled to a temporary folder."""
THREADS = 2
"""More would hold more at once, and not be noticed: what takes time is the model."""
KEY_TYPES: dict[str, tuple[str, pa.DataType]] = {
    "BOOLEAN": ("BOOLEAN", pa.bool_()),
    **dict.fromkeys(("TINYINT", "SMALLINT", "INTEGER", "BIGINT"), ("BIGINT", pa.int64())),
    **dict.fromkeys(("UTINYINT", "USMALLINT", "UINTEGER"), ("BIGINT", pa.int64())),
    "UBIGINT": ("DECIMAL(20,0)", pa.decimal128(20, 0)),
    **dict.fromkeys(("HUGEINT", "UHUGEINT"), ("DECIMAL(38,0)", pa.decimal128(38, 0))),
    **dict.fromkeys(("VARCHAR", "UUID", "JSON"), ("VARCHAR", pa.string())),
    "DATE": ("DATE", pa.date32()),
    "TIMESTAMP": ("TIMESTAMP", pa.timestamp("us")),
    **dict.fromkeys(("TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"), ("TIMESTAMP", pa.timestamp("us"))),
    "TIMESTAMP WITH TIME ZONE": ("TIMESTAMPTZ", pa.timestamp("us", "UTC")),
    "BLOB": ("BLOB", pa.binary()),
}
"""DuckDB's types that may be a key: what it is compared and stored as, in SQL and in Arrow."""
DATES = ("DATE", "TIMESTAMP", "TIMESTAMPTZ")
STRANGE = "{0} < '0001-01-01' OR {0} >= '10000-01-01'"
"""Whether Python has no such date: it has the years 1 to 9999, and no infinity."""
CLOSING_S = 1.0
"""How long other threads have to leave the queries that closing interrupts."""
OUTPUTS = "_vllm_tasks_outputs"
IDS = "_vllm_tasks_ids"

WANTED = {
    "missing": "same IS NOT TRUE",
    "changed": "true",
    "failed": "failed IS TRUE AND NOT coalesce(same AND created >= $since, false)",
    "all": "NOT coalesce(same AND created >= $since, false)",
}
"""`Refresh` as a condition on a row joined with its output."""


def key_type(column: str, kind: str) -> tuple[str, pa.DataType]:
    """What a key column of DuckDB's type `kind` is stored as; raises `InvalidCall`."""
    if kind in KEY_TYPES:
        return KEY_TYPES[kind]
    if kind.startswith("ENUM("):
        return KEY_TYPES["VARCHAR"]
    if match := re.fullmatch(r"DECIMAL\((\d+),(\d+)\)", kind):
        return kind, pa.decimal128(int(match[1]), int(match[2]))
    raise InvalidCall(
        f"the column {column!r} is of type {kind[:100]}, which cannot be a key, as equal values are not "
        "surely the same; give another primary_id, or CAST it to VARCHAR in a SELECT"
    )


class NoRows:
    """The `Writer` to outputs that are not there yet, of a source without rows: its keys have no types."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def commit(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        """See `Writer.commit`; there is nothing to commit."""
        if rows or redo:
            raise TablesUnavailable(f"the source in {self._shown!r} had no rows, and has some now")

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`."""

    def close(self) -> None:
        """See `Writer.close`."""


class Lake:
    """The tables of a folder or an fsspec URL."""

    def __init__(self, url: str) -> None:
        self._files = Files(*_opened(url))
        self._url = self._files.uri(self._files.root)
        self._shown = without_secrets(self._url)
        # Made by DuckDB when it spills first: a killed process leaves no empty folder.
        self._spill = f"{tempfile.gettempdir()}/vllm-tasks-{uuid4().hex}"
        self._con: duckdb.DuckDBPyConnection | None = None
        self._cursors: set[duckdb.DuckDBPyConnection] = set()
        """Those that a query is on."""
        con = duckdb.connect(
            config={
                "memory_limit": MEMORY,
                "threads": THREADS,
                "temp_directory": self._spill,
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )
        if not self._files.local:
            con.register_filesystem(self._files.fs)
        # A SELECT reads the lake and nothing else, whatever functions it calls.
        for setting in (
            "TimeZone = 'UTC'",
            f"allowed_directories = [{literal(self._url + '/')}, {literal(exactly(self._url) + '/')}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            con.execute(f"SET {setting}")
        self._con = con
        self._sources: dict[tuple[Any, ...], Source] = {}

    def check(self, selection: Selection) -> None:
        """See `Tables.check`."""
        self._outputs(selection)
        faults, width = self._faults(selection), len(selection.key)
        named, select = ", ".join(selection.key), selection.select[:200]
        source = f"{select[:60]}..." if len(select) > 60 else select
        logger.info("checking that %s is unique in %s: one pass", named, source)
        with self._cursor(selection) as cursor:
            nulls, strange, doubled, rows, *examples = cursor.execute(faults).fetchall()[0]

        def shown(values: Sequence[Any]) -> str:
            return ", ".join(f"{n}={v!r:.100}" for n, v in zip(selection.key, values, strict=True))

        if nulls:
            raise InvalidCall(
                f"{nulls} rows of {select!r} have NULL for {named}; leave them out with "
                "SELECT ... WHERE ... IS NOT NULL, or give another primary_id"
            )
        if strange:
            raise InvalidCall(
                f"{strange} rows of {select!r} have a key with a date that Python does not have, for example "
                f"{shown(examples[width:])}; CAST it to VARCHAR in a SELECT, leave them out with "
                "SELECT ... WHERE, or give another primary_id"
            )
        if doubled:
            raise InvalidCall(
                f"{named} does not identify the rows of {select!r}: {doubled} keys have {rows} rows, "
                f"for example {shown(examples[:width])}; give another primary_id, or several columns"
            )

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        """See `Tables.rows`."""
        wanted = [f"k{i}" for i in range(len(selection.key))]
        wanted += [f"v{i}" for i in range(len(selection.columns))]
        wanted += ["same IS NOT NULL", "NULL" if selection.refresh == "missing" else "if(same, hash, NULL)"]
        with self._joined(selection) as (cursor, source, parameters):
            types = self._types(selection)
            decode = [json.loads if types[name] == "JSON" else None for name in selection.columns]
            query = f"SELECT {', '.join(wanted)} {source} WHERE {WANTED[selection.refresh]}"
            with cursor.sql(query, params=parameters).to_arrow_reader(size) as reader:
                for batch in reader:
                    for start in range(0, batch.num_rows, size):
                        yield _source_rows(batch.slice(start, size), len(selection.key), decode)

    def count(self, selection: Selection) -> tuple[int, int]:
        """See `Tables.count`."""
        with self._joined(selection) as (cursor, source, parameters):
            query = f"SELECT count(*), count(*) FILTER ({WANTED[selection.refresh]}) {source}"
            found = cursor.execute(query, parameters).fetchall()[0]
        return found[0], found[1]

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        """See `Tables.writer`."""
        url = self._at(table.name)
        there = self._outputs(selection)
        if there is None and self._is_empty(selection):
            # The types of no rows' keys would be those of the table for ever.
            return NoRows(self._shown)
        types = self._types(selection)
        key = {name: key_type(name, types[name])[1] for name in selection.key}
        schema = table_schema(key, table, there)
        properties = writer_properties(table.compression)
        delta = make_table(url, schema, len(selection.key), table.partition_by)
        return DeltaWriter(url, schema, selection.key, properties, delta, self._open().cursor())

    def outputs(self, name: str) -> pa.Table:
        """See `Tables.outputs`."""
        url = self._at(name)
        found = find_table(url)
        if found is None:
            hint = near(name, list(self._files.tables()))
            raise InvalidCall(f"there are no outputs {name!r} in {self._shown!r}{hint}")
        with storage_errors(f"cannot read {self.where(name)}"):
            return dataset(found).to_table()

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        """See `Tables.read`."""
        source = self._described(select)
        with self._attached(select, source) as cursor:
            if (names := self._wanted(cursor, select, source, columns)) is None:
                return
            decode = [json.loads if source.types[name] == "JSON" else None for name in names]
            wanted = ", ".join(_readable(name, source.types[name]) for name in names)
            query = f"SELECT {wanted} FROM {VIEW}"  # noqa: S608 - the names are quoted
            with cursor.sql(query).to_arrow_reader(PAGE) as reader:
                for batch in reader:
                    for start in range(0, batch.num_rows, PAGE):
                        values = _values(batch.slice(start, PAGE), decode)
                        yield [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]

    def has(self, name: str) -> bool:
        """See `Tables.has`."""
        return self._files.has(name)

    def put(self, name: str, rows: pa.Table, key: Sequence[str]) -> None:
        """See `Tables.put`."""
        url = self._at(name)
        new = checked(name, rows, key)
        delta = make_table(url, new.schema, len(key), way_out=WAY_OUT)
        schema = pa.schema([new.schema.field(column) for column in _names(delta)])
        cursor = self._open().cursor()
        writer = DeltaWriter(url, schema, key, writer_properties(None), delta, cursor, told=False)
        try:
            writer.replace(new.select(schema.names), new.select(list(key)).slice(0, 0))
        finally:
            writer.close()

    def where(self, name: str) -> str:
        """See `Tables.where`."""
        return f"{self._shown}/{name}"

    def close(self) -> None:
        """See `Tables.close`."""
        con, self._con = self._con, None
        if con is None:
            return
        # Whoever keeps this object (Prefect keeps the arguments of its task runs) must not keep DuckDB's,
        # which complains at the end of the process about what is still there.
        patience = time.monotonic() + CLOSING_S
        while self._cursors and time.monotonic() < patience:
            for cursor in list(self._cursors):
                with suppress(duckdb.Error):  # it has ended meanwhile
                    cursor.interrupt()
            time.sleep(0.01)
        con.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    # ------------------------------------------------------------------ queries

    def _at(self, name: str) -> str:
        """The URL of the outputs `name`; raises `InvalidCall` for what would be somewhere else."""
        if name in ("", ".", "..") or set(name) & set("/\\"):
            raise InvalidCall(
                f"{name!r} is no name of a table; give another predict_id or name, without / and \\"
            )
        return f"{self._url}/{name}"

    def _cursor(self, selection: Selection) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        return self._attached(selection.select, self._source(selection))

    @contextmanager
    def _attached(self, select: str, source: Source) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that knows the source as `VIEW`; DuckDB's errors become what the caller does next."""
        with self._attaching(select) as cursor:
            source.attach(cursor)
            yield cursor

    @contextmanager
    def _attaching(self, select: str) -> Iterator[duckdb.DuckDBPyConnection]:
        with storage_errors(f"cannot read {select[:200]!r} in {self._shown!r}"):
            cursor = self._open().cursor()
            self._cursors.add(cursor)
            try:
                yield cursor
            finally:
                self._cursors.discard(cursor)
                cursor.close()

    def _open(self) -> duckdb.DuckDBPyConnection:
        """Raises `TablesUnavailable` for a thread that comes late."""
        if (con := self._con) is None:
            raise TablesUnavailable(f"the lake {self._shown!r} was closed")
        return con

    def _source(self, selection: Selection) -> Source:
        """Found and described once: `rows` reads the files that `check` has seen."""
        if (source := self._sources.get(_named(selection))) is None:
            source = self._sources[_named(selection)] = self._described(selection.select)
        return source

    def _described(self, select: str) -> Source:
        source = self._files.source(select)
        with self._attaching(select) as cursor:
            return source.described(cursor)

    def _wanted(
        self, cursor: duckdb.DuckDBPyConnection, select: str, source: Source, columns: Sequence[str] | None
    ) -> list[str] | None:
        """The columns to read, None when the source has no rows to tell which there are."""
        there = cursor.sql(source.sql).columns
        names = list(dict.fromkeys(there if columns is None else columns))
        if missing := [name for name in names if name not in there]:
            if _has_no_rows(cursor):
                return None
            raise _no_columns(select, missing, there)
        folded = [name.casefold() for name in there]
        if twice := [name for name in names if folded.count(name.casefold()) > 1]:
            raise InvalidCall(f"{select[:200]!r} has two columns {twice[0]!r}; name one otherwise with AS")
        return names

    def _is_empty(self, selection: Selection) -> bool:
        with self._cursor(selection) as cursor:
            return _has_no_rows(cursor)

    def _stand_in(self, selection: Selection, types: dict[str, pa.DataType]) -> None:
        """In place of a source without rows, which has no types, one that has what the outputs have."""
        kinds = {name: types.get(name, pa.string()) for name in selection.key}
        schema = pa.schema(dict.fromkeys(selection.columns, pa.string()) | kinds)
        source = Source("FROM _vllm_tasks_nothing", {}, {"_vllm_tasks_nothing": schema.empty_table()})
        with self._attaching(selection.select) as cursor:
            self._sources[_named(selection)] = source.described(cursor)

    @contextmanager
    def _joined(
        self, selection: Selection
    ) -> Iterator[tuple[duckdb.DuckDBPyConnection, str, dict[str, Any]]]:
        """A cursor, the FROM clause of the source joined with its outputs, and the parameters for both.

        Columns: k0... the key; v0... the values; same, failed, hash, created of the output, NULL without one.
        """
        outputs = self._outputs(selection)
        columns = self._casts(selection)
        types = self._types(selection)
        columns += [f"{_readable(name, types[name])} AS v{i}" for i, name in enumerate(selection.columns)]
        using = f"USING ({', '.join(f'k{i}' for i in range(len(selection.key)))})"
        clause = f"FROM (SELECT {', '.join(columns)} FROM {VIEW})"  # noqa: S608 - the names are quoted
        parameters: dict[str, Any] = {}
        with self._cursor(selection) as cursor:
            if selection.ids is not None:
                cursor.register(IDS, self._ids(selection))
                clause += f" SEMI JOIN {IDS} {using}"
            if selection.shard is not None:
                clause = f"FROM (SELECT * {clause} WHERE {_in_shard(selection.shard, len(selection.key))})"
            if outputs is None:
                nothing = "NULL::BOOLEAN AS same, NULL::BOOLEAN AS failed, NULL::VARCHAR AS hash"
                clause = f"FROM (SELECT *, {nothing}, NULL::TIMESTAMPTZ AS created {clause})"
            else:
                self._attach_outputs(cursor, self._at(selection.outputs), outputs)
                keys = ", ".join(f"{quoted(name)} AS k{i}" for i, name in enumerate(selection.key))
                once = f"WHERE coalesce({POSITION}, 0) = 0" if POSITION in _names(outputs) else ""
                clause += f""" LEFT JOIN (
                    SELECT {keys}, _fingerprint IS NOT DISTINCT FROM $fingerprint AS same,
                        _error IS NOT NULL AS failed, _input_hash AS hash, _created_at AS created
                    FROM {OUTPUTS} {once}
                ) {using}"""  # noqa: S608 - the names are quoted
                parameters["fingerprint"] = selection.fingerprint
            if "$since" in WANTED[selection.refresh]:
                parameters["since"] = selection.since
            yield cursor, clause, parameters

    def _types(self, selection: Selection) -> Mapping[str, str]:
        """DuckDB's types by column; raises `InvalidCall` when a wanted one is not there."""
        found = self._source(selection).types
        missing = [name for name in dict.fromkeys(selection.key + selection.columns) if name not in found]
        if missing:
            if self._is_empty(selection):
                self._stand_in(selection, {})
                return self._source(selection).types
            raise _no_columns(selection.select, missing, list(found))
        return found

    def _casts(self, selection: Selection) -> list[str]:
        """The key's columns as k0..., of the types that the outputs have."""
        types = self._types(selection)
        kinds = [key_type(name, types[name])[0] for name in selection.key]
        columns = zip(selection.key, kinds, strict=True)
        return [f"CAST({quoted(name)} AS {kind}) AS k{i}" for i, (name, kind) in enumerate(columns)]

    def _faults(self, selection: Selection) -> str:
        """A query for how many rows have NULL in the key, a date that Python has not, and a key of others.

        Its columns: the rows with NULL; with such a date; the doubled keys; their rows; one such key; one
        with such a date, as text.
        """
        types = self._types(selection)
        keys = [f"k{i}" for i in range(len(selection.key))]
        null = f"({' OR '.join(f'{k} IS NULL' for k in keys)})"
        kinds = zip(keys, (key_type(name, types[name])[0] for name in selection.key), strict=True)
        strange = f"({' OR '.join(STRANGE.format(k) for k, kind in kinds if kind in DATES) or 'false'})"
        return f"""
            SELECT coalesce(sum(n) FILTER ({null}), 0)::BIGINT,
                coalesce(sum(n) FILTER ({strange}), 0)::BIGINT,
                count(*) FILTER (NOT {null}), coalesce(sum(n) FILTER (NOT {null}), 0)::BIGINT,
                {", ".join(f"first({k}) FILTER (NOT {null})" for k in keys)},
                {", ".join(f"first({k}::VARCHAR) FILTER ({strange})" for k in keys)}
            FROM (
                SELECT {", ".join(keys)}, count(*) AS n
                FROM (SELECT {", ".join(self._casts(selection))} FROM {VIEW})
                GROUP BY ALL HAVING count(*) > 1 OR {null} OR {strange}
            )
            """  # noqa: S608 - the names are quoted

    def _attach_outputs(self, cursor: duckdb.DuckDBPyConnection, url: str, outputs: DeltaTable) -> None:
        """Make the outputs known to `cursor` as `OUTPUTS`."""
        # Their URIs are percent-encoded; the names in them are made of a UUID.
        files = [f"{url}/{uri.rsplit('/', 1)[-1]}" for uri in outputs.file_uris()]
        if self._files.local and files and not outputs.metadata().partition_columns:
            # By DuckDB's own reader: 230 MB less than through pyarrow for 9 M rows.
            cursor.execute(f"CREATE TEMP VIEW {OUTPUTS} AS {reading('parquet', files)}")
        else:
            cursor.register(OUTPUTS, filterable(outputs))

    def _outputs(self, selection: Selection) -> DeltaTable | None:
        """The outputs, None if there are none yet; raises `InvalidCall` for other keys."""
        self._types(selection)  # what is wrong with the source is told first
        outputs = find_table(self._at(selection.outputs))
        if outputs is None:
            return None
        there = {field.name: field.type for field in arrow_schema(outputs)}
        wrong = self._differences(selection, there)
        if wrong and self._is_empty(selection):
            self._stand_in(selection, there)
            wrong = self._differences(selection, there)
        if wrong:
            raise InvalidCall(
                f"the outputs {self.where(selection.outputs)!r} have another shape: {'; '.join(wrong)}; give "
                "another predict_id"
            )
        return outputs

    def _differences(self, selection: Selection, there: dict[str, pa.DataType]) -> list[str]:
        types = self._types(selection)
        here = {name: key_type(name, types[name])[1] for name in selection.key}
        wrong = [
            f"{n!r} is {there.get(n, 'missing')}, not {kind}"
            for n, kind in here.items()
            if there.get(n) != kind
        ]
        return wrong + [f"{n!r} is missing" for n in OWN_COLUMNS if n not in there.keys() | LATER]

    def _ids(self, selection: Selection) -> pa.Table:
        types = self._types(selection)
        ids = [_plain_key(i, len(selection.key)) for i in selection.ids or ()]
        columns = []
        for i, name in enumerate(selection.key):
            kind = key_type(name, types[name])[1]
            try:
                columns.append(arrow_column(name, kind, [row[i] for row in ids]))
            except ValueError as e:
                raise InvalidCall(f"ids: {e}") from e
        return pa.table(columns, names=[f"k{i}" for i in range(len(selection.key))])


def _in_shard(shard: tuple[int, int], keys: int) -> str:
    """A condition on k0... By MD5, the same in every version of DuckDB: shards run on many machines."""
    index, count = shard
    texts = ", ".join(f"CAST(k{i} AS VARCHAR)" for i in range(keys))
    return f"md5_number_lower(concat_ws(chr(31), {texts})) % {count:d} = {index:d}"


def _named(selection: Selection) -> tuple[Any, ...]:
    """What a source depends on."""
    return selection.select, selection.key, selection.columns, selection.outputs


def _has_no_rows(cursor: duckdb.DuckDBPyConnection) -> bool:
    return not cursor.execute(f"FROM {VIEW} LIMIT 1").fetchall()


def _no_columns(select: str, missing: Sequence[str], there: Sequence[str]) -> InvalidCall:
    hints = "".join(near(name, there) for name in missing[:3])
    return InvalidCall(
        f"{select[:200]!r} has no column {', '.join(map(repr, missing))}{hints}; "
        f"it has {', '.join(map(repr, there[:50]))}"
    )


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem that a lake is on, and its path there."""
    if "://" not in url:
        # fsspec would take a :: in it for one filesystem inside another.
        return LocalFileSystem(skip_instance_cache=True), LocalFileSystem._strip_protocol(url)
    try:
        fs, root = fsspec.url_to_fs(url, skip_instance_cache=True)
    except ImportError as e:
        raise InvalidCall(f"{url.partition('://')[0]}:// needs another package: {e}") from e
    return fs, root


def _names(table: DeltaTable) -> list[str]:
    return [field.name for field in table.schema().fields]


def _plain_key(key: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    if len(key) != width or any(value is None for value in key):
        raise InvalidCall(f"ids: {key!r:.200} is no key of {width} values, none of them None")
    return tuple(str(value) if isinstance(value, UUID) else value for value in key)


def _readable(name: str, kind: str) -> str:
    return f"CAST({quoted(name)} AS TIMESTAMP)" if kind == "TIMESTAMP_NS" else quoted(name)


def _source_rows(
    batch: pa.RecordBatch, keys: int, decode: Sequence[Callable[[str], Any] | None]
) -> list[SourceRow]:
    *values, redo, hashes = _values(batch, [*[None] * keys, *decode, None, None])
    if not keys < len(values):
        parts: Any = ((key, ()) for key in zip(*values, strict=True))
    else:
        parts = zip(zip(*values[:keys], strict=True), zip(*values[keys:], strict=True), strict=True)
    return [
        SourceRow(key, value, there, input_hash)
        for (key, value), there, input_hash in zip(parts, redo, hashes, strict=True)
    ]


def _values(batch: pa.RecordBatch, decode: Sequence[Callable[[str], Any] | None]) -> list[list[Any]]:
    """Its columns as Python values; JSON, which DuckDB has as text, by its function in `decode`."""
    columns = [_python(column) for column in batch.columns]
    for i, loads in enumerate(decode):
        if loads:
            columns[i] = [None if text is None else loads(text) for text in columns[i]]
    return columns


def _python(column: pa.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError):
        values = [_one(value) for value in column]
    return values


def _one(value: pa.Scalar) -> Any:
    try:
        return value.as_py(maps_as_pydicts="strict")
    except (ValueError, OverflowError):
        return value.cast(pa.string()).as_py()  # a date that Python does not have
