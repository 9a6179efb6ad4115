"""Outputs as a Delta table: exactly one row, or one set of positions, per key, whatever rivals do."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, DeltaProtocolError, TableNotFoundError
from fsspec.implementations.local import LocalFileSystem as LocalFolders
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION, Key, OutputTable, Row
from vllm_tasks.errors import InvalidCall, TablesUnavailable

logger = logging.getLogger(__name__)

ARROW_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "bytes": pa.binary(),
    "json": pa.string(),
    "timestamp": pa.timestamp("us", "UTC"),
}
INT64 = range(-(2**63), 2**63)
JSON = {"json": "1"}
"""Metadata of a text column that holds JSON."""
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "LZ4_RAW", "ZSTD")
UNNAMEABLE = re.compile(r"[][\\^|]|%[0-9A-Fa-f]{2}")
"""What delta-rs 1.6 fails over, or panics, in a table's path."""
MANGLED = re.compile(r"[#?\x00-\x1f\x7f]| $")
"""What it leaves out of a URL, with what follows #, ?: the tables `a` and `a#1` would be one."""
ONCE = CommitProperties(max_commit_retries=0)
"""Commit as the version after the one loaded, or fail: delta-rs's own retries would let two appends of
one key pass."""
COLOURS = re.compile("\x1b\\[[0-9;]*m|↳")
"""What delta-rs draws its errors with."""
REMOTE = re.compile(r"(\w+ Error: )?Traceback \(.*?\n(?P<words>\S[^\n]*)", re.DOTALL)
"""What DuckDB says when an fsspec filesystem fails: a traceback, which ends with the filesystem's words."""
SAID_BY_DUCKDB = re.compile(r"([A-Z]\w+ )+Error: ")
PASSING = re.compile(
    "^(IO|HTTP|Out of Memory|INTERRUPT|Connection) Error"
    "|^Invalid Input Error: reading the stream registered as .* failed: IOError"
)
"""DuckDB's errors of what is not there now: its own, and those of the files that Arrow reads for it."""
DENIED = re.compile("permission denied|accessdenied|access denied|forbidden", re.IGNORECASE)
ATTEMPTS = 100
FILE_BYTES = 4 << 20
"""What compaction and merges aim at. A redone row costs a new copy of the file that it is in, and the old
copy stays for the readers of the past: large files would make redoing dear, in time and in disk."""
SMALL_FILES = 50
COMPACT_EVERY = 200
"""Own commits."""
TAKEN = "_vllm_tasks_taken"
"""Hashes of the keys that the outputs hold beyond those that the caller knows of: of 10 M keys 80 MB, which
DuckDB spills, and 30 ms a commit, where the keys themselves take 400 ms and 400 MB when they are text. A
hash that two keys share costs a merge, and nothing else."""


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def storage_options(url: str) -> dict[str, str] | None:
    """What delta-rs is told beyond the environment."""
    if "://" not in url:
        return None
    options = {"max_retries": "4", "retry_timeout": "30s", "connect_timeout": "5s"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
    if endpoint.startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


def plain(error: BaseException) -> str:
    """The words of an error, on one line, without who may log in to a URL in them."""
    words = str(error)
    if match := REMOTE.match(words):
        words = match["words"]
    return without_userinfo(" ".join(COLOURS.sub("", words).split())) or type(error).__name__


def without_userinfo(text: str) -> str:
    """`text` with `scheme://user:password@` as `scheme://`."""
    return re.sub(r"://[^/\s@'\"]*@", "://", text)


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Errors of files, delta-rs, Arrow and DuckDB as what the caller does next, with their own words.

    Each of them passes on the others' errors as its own, told apart by their words only: what is not denied
    may pass, but not what DuckDB says of a statement or of what is in a file.
    """
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError, duckdb.Error, pa.ArrowException) as e:
        words = plain(e)
        if isinstance(e, PermissionError) or DENIED.search(words):
            raise InvalidCall(f"{doing}: not allowed: {words}") from e
        raise (InvalidCall if _lasts(e, words) else TablesUnavailable)(f"{doing}: {words}") from e


def _lasts(error: Exception, words: str) -> bool:
    if isinstance(error, DeltaProtocolError):
        return True
    if isinstance(error, DeltaError) or REMOTE.match(str(error)) or PASSING.search(words):
        return False
    # What fails in the middle of a stream comes as Arrow's OSError, with DuckDB's words.
    return not isinstance(error, OSError) or bool(SAID_BY_DUCKDB.match(words))


def find_table(url: str) -> DeltaTable | None:
    """The latest version, None when there is no table; raises `InvalidCall` for a name that Delta refuses."""
    if match := UNNAMEABLE.search(url) or ("://" in url and MANGLED.search(url)) or None:
        raise InvalidCall(
            f"no Delta table can be in {without_userinfo(url)!r}, because of the {match[0]!r} in it; move "
            "the lake, or give another predict_id"
        )
    with storage_errors(f"cannot read {without_userinfo(url)}"):
        try:
            # `DeltaTable.is_deltatable` would hold the GIL, and with it all threads, while it waits.
            return DeltaTable(url, storage_options=storage_options(url))
        except TableNotFoundError:
            return None


def open_table(url: str) -> DeltaTable:
    """The latest version; raises `InvalidCall` when there is none."""
    if (table := find_table(url)) is None:
        raise InvalidCall(f"there is no Delta table {without_userinfo(url)!r}")
    return table


def dataset(table: DeltaTable) -> ds.Dataset:
    """The table as pyarrow reads it.

    Local files by Arrow's own filesystem: delta-rs's one has Arrow's threads call Python, and of 15
    processes that ended right after reading 9 M rows so, 9 aborted; with this one, none.
    """
    uri = table.table_uri
    local = uri.startswith("file://") or "://" not in uri
    folder = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
    files = SubTreeFileSystem(folder, LocalFileSystem()) if local else None
    return table.to_pyarrow_dataset(filesystem=files)


def arrow_schema(table: DeltaTable) -> pa.Schema:
    """The table's, in pyarrow's types."""
    return pa.schema(table.schema())


def table_schema(key: dict[str, pa.DataType], table: OutputTable) -> pa.Schema:
    """Raises `InvalidCall` when two columns would have one name."""
    fields = [pa.field(name, kind) for name, kind in key.items()]
    fields += [
        pa.field(c.name, ARROW_TYPES[c.kind], metadata=JSON if c.kind == "json" else None)
        for c in table.columns
    ]
    if table.flatten:
        fields.append(pa.field(POSITION, pa.int64()))
    fields += [pa.field(name, ARROW_TYPES[kind]) for name, kind in OWN_COLUMNS.items()]
    seen: set[str] = set()
    for f in fields:
        if f.name.casefold() in seen:
            raise InvalidCall(
                f"two columns of the outputs would be named {f.name!r}; rename the column of the key "
                "(SELECT ... AS another_name) or of the output"
            )
        seen.add(f.name.casefold())
    return pa.schema(fields)


def _shape(schema: pa.Schema) -> dict[str, str]:
    return {f.name: "json" if (f.metadata or {}).get(b"json") else str(f.type) for f in schema}


def indexed(key: Iterable[pa.DataType]) -> int:
    """How many columns get bounds by which a merge skips files: the key's, or none.

    Never those of what the model said, which would fill the log. delta-rs 1.6 writes wrong bounds of
    decimals (as a float, or the next 64-bit integer), and rounds timestamps: a merge then passes over
    rows that it should take.
    """
    kinds = list(key)
    exact = (pa.types.is_int64, pa.types.is_string, pa.types.is_date32, pa.types.is_boolean)
    return len(kinds) if all(any(is_one(kind) for is_one in exact) for kind in kinds) else 0


def refuse_taken(url: str) -> None:
    """Raise `InvalidCall` when there are files in the folder: cleaning up a Delta table would remove them."""
    fs, path = (
        fsspec.url_to_fs(url, skip_instance_cache=True)
        if "://" in url
        else (LocalFolders(skip_instance_cache=True), url)
    )
    with storage_errors(f"cannot list {without_userinfo(url)}"):
        fs.invalidate_cache()
        try:
            names = [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
        except FileNotFoundError:
            return
    if names and "_delta_log" not in names:
        raise InvalidCall(
            f"{without_userinfo(url)!r} is no Delta table but has files, for example {min(names)!r}; give "
            "another predict_id, or move them away"
        )


def make_table(url: str, schema: pa.Schema, table: OutputTable, keys: int) -> DeltaTable:
    """The table, made unless it is there; raises `InvalidCall` when it is there with another shape."""
    if strange := set(table.partition_by) - set(schema.names):
        raise InvalidCall(
            f"partition_by names {sorted(strange)}, the outputs have {', '.join(map(repr, schema.names))}"
        )
    for name, kind in zip(schema.names[:keys], schema.types, strict=False):
        if name in table.partition_by and (pa.types.is_string(kind) or pa.types.is_binary(kind)):
            # Delta has '' as NULL, and bytes as text, in the names of partitions.
            raise InvalidCall(
                f"partition_by names {name!r}, a column of the key, whose type {kind} no partition holds "
                "exactly; partition by another column"
            )
    made = find_table(url)
    if made is None:
        refuse_taken(url)
        try:
            with storage_errors(f"cannot write {without_userinfo(url)}"):
                return DeltaTable.create(
                    url,
                    schema,
                    partition_by=list(table.partition_by),
                    storage_options=storage_options(url),
                    configuration={"delta.dataSkippingNumIndexedCols": str(indexed(schema.types[:keys]))},
                    commit_properties=ONCE,
                )
        except (TablesUnavailable, CommitFailedError):
            made = find_table(url)
            if made is None:
                raise
            # A rival made it in this moment.
    found = arrow_schema(made)
    differences = _differences(_shape(found), _shape(schema))
    partitions = tuple(made.metadata().partition_columns)
    if partitions != table.partition_by:
        differences.append(f"it is partitioned by {list(partitions)}, not {list(table.partition_by)}")
    if differences:
        raise InvalidCall(
            f"the outputs {without_userinfo(url)!r} have another shape: {'; '.join(differences)}; give "
            "another predict_id"
        )
    return made


def _differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    lines = [f"no column {n!r}" for n in here if n not in there]
    lines += [f"a column {n!r} that is not wanted" for n in there if n not in here]
    lines += [f"{n!r} is {there[n]}, not {here[n]}" for n in here if n in there and there[n] != here[n]]
    return lines


def writer_properties(compression: str | None) -> WriterProperties:
    """Raises `InvalidCall` for a compression that Parquet does not have."""
    chosen: Any = (compression or "zstd").upper()
    if chosen not in CODECS:
        raise InvalidCall(f"compression={compression!r} is none of {', '.join(CODECS).lower()}")
    return WriterProperties(compression=chosen)


def arrow_column(name: str, kind: pa.DataType, values: Sequence[Any], as_json: bool = False) -> pa.Array:
    """Raises ValueError naming the column when a value does not fit."""
    try:
        if as_json:
            values = [None if v is None else to_json(v) for v in values]
        elif pa.types.is_string(kind):
            for v in values:
                if v is not None and not isinstance(v, str):
                    raise TypeError(f"{v!r:.100} is no text")
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"column {name!r} ({kind}) cannot hold a value: {e}") from e


def problem_of(field: pa.Field) -> Callable[[Any], str | None]:
    """The function that says why a column cannot hold a value, None when it can."""
    if (field.metadata or {}).get(b"json"):
        return _no_json
    if pa.types.is_string(field.type):
        return _no_text
    if pa.types.is_int64(field.type):
        return _no_int
    plain_types: dict[pa.DataType, tuple[type, ...]] = {
        pa.bool_(): (bool,),
        pa.binary(): (bytes,),
        pa.timestamp("us", "UTC"): (datetime,),
    }
    if (types := plain_types.get(field.type)) is not None:
        return lambda v: (
            None if v is None or isinstance(v, types) else f"{v!r:.100} is no {types[0].__name__}"
        )
    return lambda v: _no_arrow(field.type, v)


def _no_arrow(kind: pa.DataType, value: Any) -> str | None:
    if type(value) is float and pa.types.is_float64(kind):
        return None
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
        return f"{e} ({kind})"
    return None


def _no_int(value: Any) -> str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value in INT64):
        return None
    return f"{value!r:.100} is no whole number of 64 bits"


def _no_text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return f"{value!r:.100} is no text"
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return "half a character (a lone surrogate) cannot be stored"
    return None


def _no_json(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return _no_text(to_json(value))
    except (TypeError, ValueError, RecursionError) as e:
        return f"cannot be JSON: {e}"


def to_json(value: Any) -> str:
    """Raises TypeError, ValueError or RecursionError for what JSON cannot say."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class DeltaWriter:
    """Commits to the Delta table at `url`, starting from the version loaded now."""

    def __init__(
        self,
        url: str,
        schema: pa.Schema,
        key: Sequence[str],
        properties: WriterProperties,
        delta: DeltaTable,
        cursor: duckdb.DuckDBPyConnection,
    ) -> None:
        self._url = url
        self._shown = without_userinfo(url)
        self._schema = schema
        self._key = pa.schema([schema.field(name) for name in key])
        self._properties = properties
        self._delta: DeltaTable | None = delta
        self._problems = [(f.name, problem_of(f)) for f in schema]
        self._known = set(delta.file_uris())
        """Files whose keys the caller's `redo` accounts for, or `TAKEN`."""
        self._cursor = cursor
        with storage_errors("cannot keep the keys of the outputs"):
            cursor.execute(f"CREATE TEMP TABLE {TAKEN} (hash UBIGINT)")
        self._mine: pa.Table | None = None
        """The keys of the last commit, written or not: they are in `TAKEN` from the next one on."""
        self._commits = 0

    def commit(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        """See `Writer.commit`; of two outputs of one key in `rows`, the later one is written."""
        new = self._table(self._last(rows))
        old = self._keys(redo)
        if not (new.num_rows or old.num_rows):
            return
        if self._mine is not None:
            with storage_errors(f"cannot keep the keys of {self._shown}"):
                self._remember(self._mine)
        # Before anything is written: whatever ends this call, a repetition of it replaces.
        self._mine = new.select(self._key.names)
        for attempt in range(ATTEMPTS):
            try:
                with storage_errors(f"cannot write {self._shown}"):
                    delta = self._latest()
                    self._write(delta, new, self._distinct(old, self._taken(new)))
                    self._known = set(delta.file_uris())
                break
            except CommitFailedError as e:
                # A rival has this version: take in what it wrote, and try for the next one.
                self._delta = None
                lost = e
                time.sleep(random.uniform(0, min(1.0, 0.02 * 1.5**attempt)))
            except BaseException:
                self._delta = None
                raise
        else:
            raise TablesUnavailable(
                f"cannot write {self._shown}: rivals were faster {ATTEMPTS} times: {lost}"
            ) from lost
        self._commits += 1
        if self._commits % COMPACT_EVERY == 0:
            self._compact()

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`."""
        for name, problem_of_value in self._problems:
            if problem := problem_of_value(row[name]):
                return f"column {name!r}: {problem}"
        for name in self._key.names:
            if row[name] is None:
                return f"column {name!r}: NULL is no key"
        return None

    def close(self) -> None:
        """See `Writer.close`."""
        if self._commits and self._compact():
            self._clean()
        self._commits = 0
        self._cursor.close()

    def _last(self, rows: Sequence[Row]) -> list[Row]:
        """The last output of each key: a position that comes again begins it anew."""
        found: dict[Key, dict[int, Row]] = {}
        for row in rows:
            output = found.setdefault(tuple(row[name] for name in self._key.names), {})
            position = row.get(POSITION) or 0
            if position in output:
                output.clear()
            output[position] = row
        return [row for output in found.values() for row in output.values()]

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        columns = [
            arrow_column(f.name, f.type, [row[f.name] for row in rows], bool((f.metadata or {}).get(b"json")))
            for f in self._schema
        ]
        return pa.table(columns, schema=self._schema)

    def _keys(self, keys: Collection[Key]) -> pa.Table:
        listed = list(keys)
        columns = [arrow_column(f.name, f.type, [k[i] for k in listed]) for i, f in enumerate(self._key)]
        return pa.table(columns, schema=self._key)

    def _distinct(self, *tables: pa.Table) -> pa.Table:
        return pa.concat_tables(tables).group_by(self._key.names).aggregate([]).select(self._key.names)

    def _latest(self) -> DeltaTable:
        """The latest version; the keys that rivals wrote since the last one are in `TAKEN` then."""
        if self._delta is None:
            self._delta = open_table(self._url)
        else:
            self._delta.update_incremental()
        files = set(self._delta.file_uris())
        if files - self._known:
            # A compaction's or merge's files hold keys known before, too: those cost a look, and no more.
            self._remember(_only(self._delta, files - self._known))
            self._known = files
        return self._delta

    def _remember(self, rows: pa.Table | ds.Dataset) -> None:
        """Count the keys of `rows` as taken: rivals may write more than there is memory, DuckDB spills."""
        self._cursor.register("_vllm_tasks_added", rows)
        query = f"SELECT {self._hash} FROM _vllm_tasks_added AS n"  # noqa: S608 - the names are quoted
        self._cursor.execute(f"INSERT INTO {TAKEN} {query}")
        self._cursor.unregister("_vllm_tasks_added")

    def _taken(self, new: pa.Table) -> pa.Table:
        """The keys of `new` that rivals wrote, or this writer before; rarely another one, by its hash."""
        keys = new.select(self._key.names)
        self._cursor.register("_vllm_tasks_new", keys)
        query = f"FROM _vllm_tasks_new AS n SEMI JOIN {TAKEN} AS t ON {self._hash} = t.hash"
        taken = self._cursor.sql(query).to_arrow_table().cast(self._key)
        self._cursor.unregister("_vllm_tasks_new")
        return taken

    @property
    def _hash(self) -> str:
        return f"hash({', '.join(f'n.{quoted(name)}' for name in self._key.names)})"

    def _write(self, delta: DeltaTable, new: pa.Table, old: pa.Table) -> None:
        if not old.num_rows:
            write_deltalake(
                delta, new, mode="append", writer_properties=self._properties, commit_properties=ONCE
            )
            return
        # One row to delete by for each key that goes, and the new ones: they match nothing, and are inserted.
        gone = pa.table(
            [
                old[f.name] if f.name in old.column_names else pa.nulls(old.num_rows, f.type)
                for f in self._schema
            ],
            schema=self._schema,
        )
        source = pa.concat_tables([_marked(gone, False), _marked(new, True)])
        keys = " AND ".join(f"s.{quoted(n)} = t.{quoted(n)}" for n in self._key.names)
        (
            delta.merge(
                source, f"s._new = false AND {keys}", source_alias="s", target_alias="t",
                streamed_exec=False,  # streamed, it would not skip files by the keys' bounds
                writer_properties=self._properties, commit_properties=ONCE,
            )
            .when_matched_delete()
            .when_not_matched_insert(
                {quoted(n): f"s.{quoted(n)}" for n in self._schema.names}, predicate="s._new = true"
            )
            .execute()
        )  # fmt: skip

    def _compact(self) -> bool:
        """Make few files of many small ones; whether that was done. A failure harms nobody."""
        try:
            delta = self._latest()
            sizes = pa.table(delta.get_add_actions(flatten=True))["size_bytes"]
            if pc.sum(pc.less(sizes, FILE_BYTES // 2)).as_py() < SMALL_FILES:
                return False
            delta.optimize.compact(
                target_size=FILE_BYTES,
                max_concurrent_tasks=1,  # each holds files in memory
                writer_properties=self._properties,
                commit_properties=ONCE,
            )
            self._known = set(delta.file_uris())
        except CommitFailedError:
            self._delta = None  # a rival was faster: the next time will do, or the rival's own compaction
            return False
        except Exception as e:  # noqa: BLE001 - whatever it is, the rows are written
            self._delta = None
            logger.warning("the small files of %s were not made into large ones: %s", self._shown, plain(e))
            return False
        return True

    def _clean(self) -> None:
        try:
            # With Delta's retention, 7 days: nobody who reads now loses a file.
            self._latest().vacuum(dry_run=False, full=True)
        except Exception as e:  # noqa: BLE001 - whatever it is, the rows are written
            self._delta = None
            logger.warning("old files of %s were not removed: %s", self._shown, plain(e))


def _only(delta: DeltaTable, files: set[str]) -> ds.Dataset:
    """The rows of these files of the table."""
    whole = dataset(delta)
    names = {uri.rsplit("/", 1)[-1] for uri in files}  # each has a UUID
    fragments = [f for f in whole.get_fragments() if f.path.rsplit("/", 1)[-1] in names]
    return ds.FileSystemDataset(fragments, whole.schema, whole.format, whole.filesystem)


def _marked(table: pa.Table, new: bool) -> pa.Table:
    return table.append_column("_new", pa.array([new] * table.num_rows, pa.bool_()))
