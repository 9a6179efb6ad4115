"""Delta tables through delta-rs: finding, creating and reading them, their columns and their errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties
from deltalake.exceptions import CommitFailedError, DeltaError, DeltaProtocolError, TableNotFoundError
from fsspec.implementations.local import LocalFileSystem as LocalFolders
from pyarrow.dataset import ParquetReadOptions
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from vllm_tasks.datalayer.lake.delta_shape import (
    beyond_plain,
    refuse_differences,
    refuse_partitions,
    refuse_unwritable,
)
from vllm_tasks.datalayer.lake.partitions import problem_of_partition
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION, OutputTable
from vllm_tasks.datalayer.storable import HALF_A_CHARACTER, INT64, is_text, to_json
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import without_secrets

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
JSON = {"json": "1"}
"""Metadata of a text column that holds JSON."""
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "LZ4_RAW", "ZSTD")
UNNAMEABLE = re.compile(r"[][\\^|]|%[0-9A-Fa-f]{2}")
"""Characters in a table's path over which delta-rs 1.6 fails or panics."""
MANGLED = re.compile(r"[#?\x00-\x1f\x7f]| $")
"""Characters that delta-rs drops from a URL, with all after # or ?: `a` and `a#1` would be one table."""
ONCE = CommitProperties(max_commit_retries=0)
"""Commit as the version after the loaded one, or fail. Dangerous to change: with delta-rs's own retries, two
concurrent appends of one key would both succeed, and the key would be there twice."""
COLOURS = re.compile("\x1b\\[[0-9;]*m|↳")
"""Terminal colours and arrows in errors of delta-rs."""
REMOTE = re.compile(r"(\w+ Error: )?Traceback \(.*?\n(?P<words>\S[^\n]*)", re.DOTALL)
"""DuckDB's error when an fsspec filesystem fails: a traceback that ends with the filesystem's message."""
SAID_BY_DUCKDB = re.compile(r"([A-Z]\w+ )+Error: ")
PASSING = re.compile(
    "^(IO|HTTP|Out of Memory|INTERRUPT|Connection) Error"
    "|^Invalid Input Error: reading the stream registered as .* failed: IOError"
    "|^External error: .*Object Store error: "
)
"""Temporary errors of DuckDB: its own, and those of files that Arrow reads for it."""
UNSUPPORTED = re.compile("Unsupported: |Invalid protocol|[Cc]atalog version|Unsupported table features")
"""Parts of delta-rs's errors about a table whose format it does not support."""
ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""The scheme at the beginning of a URL."""
FOOTERS_AT_ONCE = 16
"""Files of a table whose types are read at once."""
DENIED = re.compile("permission denied|accessdenied|access denied|forbidden", re.IGNORECASE)


def quoted(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def storage_options(url: str) -> dict[str, str] | None:
    """Options for delta-rs in addition to the environment's."""
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
    """The message of an error on one line, without credentials in URLs."""
    words = str(error)
    if match := REMOTE.match(words):
        words = match["words"]
    return without_secrets(" ".join(COLOURS.sub("", words).split())) or type(error).__name__


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Translate errors of files, delta-rs, Arrow and DuckDB into ours, with their own messages.

    Each library passes on the others' errors as its own, so only the messages distinguish them. Everything
    is temporary except refused access and DuckDB's errors about a statement or the contents of a file.
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
    if isinstance(error, DeltaProtocolError) or (isinstance(error, DeltaError) and UNSUPPORTED.search(words)):
        return True
    if isinstance(error, DeltaError) or REMOTE.match(str(error)) or PASSING.search(words):
        return False
    # A failure in the middle of a stream arrives as Arrow's OSError with DuckDB's message.
    return not isinstance(error, OSError) or bool(SAID_BY_DUCKDB.match(words))


def find_table(url: str) -> DeltaTable | None:
    """The latest version, None if there is no table; raises `InvalidCall` for a name that Delta refuses."""
    if match := UNNAMEABLE.search(url) or ("://" in url and MANGLED.search(url)) or None:
        raise InvalidCall(
            f"a Delta table cannot be in {without_secrets(url)!r}, because of the {match[0]!r} in it; move "
            "the lake, or give another predict_id or name"
        )
    with storage_errors(f"cannot read {without_secrets(url)}"):
        try:
            # `DeltaTable.is_deltatable` would hold the GIL, and so block all threads, while it waits.
            return DeltaTable(url, storage_options=storage_options(url))
        except TableNotFoundError:
            return None


def open_table(url: str) -> DeltaTable:
    """The latest version; raises `InvalidCall` if there is no table."""
    if (table := find_table(url)) is None:
        raise InvalidCall(f"there is no Delta table {without_secrets(url)!r}")
    return table


def dataset(table: DeltaTable) -> ds.Dataset:
    """The table as pyarrow reads it.

    Raises `InvalidCall` for a table whose files alone are not its rows, or are not in its folder.

    Local files are read by Arrow's own filesystem. With delta-rs's filesystem, Arrow's threads call Python: 9
    of 15 processes that ended right after reading 9 M rows aborted; with Arrow's, none.
    """
    uri = table.table_uri
    if used := beyond_plain(table):
        # pyarrow would return NULL for renamed columns, and would return deleted rows.
        raise InvalidCall(
            f"the Delta table {without_secrets(uri)!r} uses {', '.join(used)}, which cannot be read here; "
            "drop the feature from the table, or copy its rows into one without it"
        )
    local = uri.startswith("file://") or "://" not in uri
    folder = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
    files = SubTreeFileSystem(folder, LocalFileSystem()) if local else None
    refuse_outside(table)
    # Spark writes times as INT96, which pyarrow would read as nanoseconds: those cover only 1677 to 2262.
    micros = ParquetReadOptions(coerce_int96_timestamp_unit="us")
    return table.to_pyarrow_dataset(filesystem=files, parquet_read_options=micros)


def refuse_outside(table: DeltaTable) -> None:
    """Raise `InvalidCall` for a table whose log names files outside its folder."""
    # Paths are taken from the log: `file_uris` lists files that are elsewhere as if they were inside.
    for path in pa.table(table.get_add_actions(flatten=True))["path"].to_pylist():
        decoded = unquote(path)
        if ELSEWHERE.match(path) or decoded.startswith("/") or ".." in decoded.split("/"):
            raise InvalidCall(
                f"the Delta table {without_secrets(table.table_uri)!r} has a file that is not in it: "
                f"{path!r:.300}"
            )


def filterable(table: DeltaTable) -> ds.Dataset | ds.Scanner:
    """The table as DuckDB reads it.

    Merges of delta-rs write text as `string_view`, whose bounds in a file Arrow cannot compare with the text
    that DuckDB filters by. From a scanner, DuckDB reads all columns and filters without those bounds.
    """
    whole = dataset(table)
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        schemas = pool.map(lambda fragment: fragment.physical_schema, whole.get_fragments())
        views = any(pa.types.is_string_view(kind) for schema in schemas for kind in schema.types)
    return whole.scanner() if views else whole


def table_schema(key: dict[str, pa.DataType], table: OutputTable) -> pa.Schema:
    """The schema of an outputs table; raises `InvalidCall` if two columns would have one name."""
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


def indexed(key: Iterable[pa.DataType]) -> int:
    """How many columns get bounds by which a merge skips files: those of the key, or none.

    Columns of the model's output get none: their bounds would fill the log.
    """
    kinds = list(key)
    return len(kinds) if all(map(_has_exact_bounds, kinds)) else 0


def _has_exact_bounds(kind: pa.DataType) -> bool:
    """Whether delta-rs 1.6 writes exact bounds of a type. It writes decimals as a float or the next 64-bit
    integer, and rounds timestamps; with such bounds a merge skips rows that it should replace."""
    exact = (pa.types.is_int64, pa.types.is_string, pa.types.is_date32, pa.types.is_boolean)
    return any(is_one(kind) for is_one in exact)


def refuse_taken(url: str) -> None:
    """Raise `InvalidCall` if the folder has files: the vacuum of a Delta table would remove them."""
    fs, path = (
        fsspec.url_to_fs(url, skip_instance_cache=True)
        if "://" in url
        else (LocalFolders(skip_instance_cache=True), url)
    )
    with storage_errors(f"cannot list {without_secrets(url)}"):
        fs.invalidate_cache()
        try:
            names = [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
        except FileNotFoundError:
            return
    if names and "_delta_log" not in names:
        raise InvalidCall(
            f"{without_secrets(url)!r} is no Delta table but has files, for example {min(names)!r}; give "
            "another predict_id or name, or move the files away"
        )


def make_table(
    url: str,
    schema: pa.Schema,
    keys: int,
    partition_by: tuple[str, ...] = (),
    way_out: str = "give another predict_id",
) -> DeltaTable:
    """The table, created unless it exists; raises `InvalidCall` if it exists with another shape."""
    refuse_partitions(schema, keys, partition_by)
    made = find_table(url)
    if made is None:
        refuse_taken(url)
        try:
            with storage_errors(f"cannot write {without_secrets(url)}"):
                return DeltaTable.create(
                    url,
                    schema,
                    partition_by=list(partition_by),
                    storage_options=storage_options(url),
                    configuration={"delta.dataSkippingNumIndexedCols": str(indexed(schema.types[:keys]))},
                    commit_properties=ONCE,
                )
        except (TablesUnavailable, CommitFailedError):
            made = find_table(url)
            if made is None:
                raise
            # A concurrent writer created the table at the same moment.
    refuse_unwritable(made, way_out)
    refuse_differences(made, schema, partition_by, way_out)
    return made


def writer_properties(compression: str | None, schema: pa.Schema, keys: int) -> WriterProperties:
    """Parquet options that suppress wrong bounds of the key (the first `keys` columns) in every table.

    Raises `InvalidCall` for a compression that Parquet does not have.
    """
    chosen: Any = (compression or "zstd").upper()
    if chosen not in CODECS:
        raise InvalidCall(f"compression={compression!r} is not one of {', '.join(CODECS).lower()}")
    bounds = {
        field.name: ColumnProperties(statistics_enabled="NONE")
        for field in list(schema)[:keys]
        if not _has_exact_bounds(field.type)
    }
    return WriterProperties(compression=chosen, column_properties=bounds or None)


def arrow_column(name: str, kind: pa.DataType, values: Sequence[Any], as_json: bool = False) -> pa.Array:
    """The column in Arrow; raises ValueError naming it when a value does not fit."""
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


def problem_of(field: pa.Field, in_partition: bool = False) -> Callable[[Any], str | None]:
    """A function that returns why the column cannot hold a value, None if it can."""
    if in_partition and pa.types.is_string(field.type):
        as_json = bool((field.metadata or {}).get(b"json"))
        return lambda v: (
            problem_of(field)(v)
            or (None if v is None else problem_of_partition(field.name, to_json(v) if as_json else v))
        )
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
    return None if is_text(value) else HALF_A_CHARACTER


def _no_json(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return _no_text(to_json(value))
    except (TypeError, ValueError, RecursionError) as e:
        return f"cannot be JSON: {e}"
