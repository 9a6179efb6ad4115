"""Delta tables through delta-rs: finding, creating and reading them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import ColumnProperties, CommitProperties, DeltaTable, WriterProperties
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from fsspec.implementations.local import LocalFileSystem as LocalFolders
from pyarrow.dataset import ParquetReadOptions
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from vllm_tasks.datalayer.lake.columns import ARROW_TYPES, JSON
from vllm_tasks.datalayer.lake.delta_shape import (
    beyond_plain,
    refuse_differences,
    refuse_partitions,
    refuse_unwritable,
)
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION, OutputTable
from vllm_tasks.datalayer.storage_errors import storage_errors
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import without_secrets

logger = logging.getLogger(__name__)

CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "LZ4_RAW", "ZSTD")
UNNAMEABLE = re.compile(r"[][\\^|]|%[0-9A-Fa-f]{2}")
"""Characters in a table's path over which delta-rs 1.6 fails or panics."""
MANGLED = re.compile(r"[#?\x00-\x1f\x7f]| $")
"""Characters that delta-rs drops from a URL, with all after # or ?: `a` and `a#1` would be one table."""
ONCE = CommitProperties(max_commit_retries=0)
"""Commit as the version after the loaded one, or fail. Dangerous to change: with delta-rs's own retries, two
concurrent appends of one key would both succeed, and the key would be there twice."""
ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""The scheme at the beginning of a URL."""
FOOTERS_AT_ONCE = 16
"""Files of a table whose types are read at once."""
MICROS = ParquetReadOptions(coerce_int96_timestamp_unit="us")
"""Spark writes times as INT96, which pyarrow would read as nanoseconds: those cover only 1677 to 2262."""


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
    refuse_beyond_plain(table)
    refuse_outside(table)
    return table.to_pyarrow_dataset(filesystem=local_files(table), parquet_read_options=MICROS)


def columns_of(table: DeltaTable, files: Collection[str], columns: pa.Schema) -> ds.Dataset:
    """These columns of the rows in files that are directly in the table's folder.

    Unlike that of `dataset`, its time does not grow with the files of the table, to 0.1 s at 8,000 (SCALE).
    """
    refuse_beyond_plain(table)
    form = ds.ParquetFileFormat(read_options=MICROS)
    return ds.FileSystemDataset.from_paths(sorted(files), columns, form, local_files(table))


def local_files(table: DeltaTable) -> SubTreeFileSystem | None:
    """The folder of the table as a filesystem of Arrow's; None if the table is on an object store."""
    uri = table.table_uri
    if uri.startswith("file://"):
        return SubTreeFileSystem(unquote(urlsplit(uri).path), LocalFileSystem())
    return None if "://" in uri else SubTreeFileSystem(uri, LocalFileSystem())


def refuse_beyond_plain(table: DeltaTable) -> None:
    """Raise `InvalidCall` for a table whose files alone are not its rows."""
    if used := beyond_plain(table):
        # pyarrow would return NULL for renamed columns, and would return deleted rows.
        raise InvalidCall(
            f"the Delta table {without_secrets(table.table_uri)!r} uses {', '.join(used)}, which cannot be "
            "read here; drop the feature from the table, or copy its rows into one without it"
        )


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
    """The schema of an outputs table; raises `InvalidCall` if two columns would have one name.

    `_position` is taken even without `flatten`: outputs that have it are read as flattened ones.
    """
    fields = [pa.field(name, kind) for name, kind in key.items()]
    fields += [
        pa.field(c.name, ARROW_TYPES[c.kind], metadata=JSON if c.kind == "json" else None)
        for c in table.columns
    ]
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
    return pa.schema([f for f in fields if table.flatten or f.name != POSITION])


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
            f"{without_secrets(url)!r} is not a Delta table but has files, for example {min(names)!r}; give "
            "another predict_id or name, or move the files away"
        )


ANOTHER = "give another predict_id"
"""The way out when outputs exist with another shape."""


def make_table(
    url: str,
    schema: pa.Schema,
    keys: int,
    partition_by: tuple[str, ...] = (),
    way_out: str = ANOTHER,
) -> DeltaTable:
    """The table, created unless it exists; raises `InvalidCall` if it exists with another shape."""
    if (made := fitting_table(url, schema, keys, partition_by, way_out)) is not None:
        return made
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
        made = fitting_table(url, schema, keys, partition_by, way_out)
        if made is None:
            raise
        return made  # a concurrent writer created the table at the same moment


def fitting_table(
    url: str, schema: pa.Schema, keys: int, partition_by: tuple[str, ...], way_out: str
) -> DeltaTable | None:
    """The table, None if there is none; raises `InvalidCall` if it has another shape or could not be made."""
    refuse_partitions(schema, keys, partition_by)
    made = find_table(url)
    if made is None:
        refuse_taken(url)
        return None
    refuse_unwritable(made, way_out)
    refuse_differences(made, schema, partition_by, way_out)
    return made


def refuse_unwritable_folder(url: str) -> None:
    """Raise `InvalidCall` for a local folder in which this user cannot create or change the table."""
    if "://" in url:
        return
    there = next(folder for folder in (Path(url), *Path(url).parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidCall(f"cannot write {url}: not allowed: permission denied for {there}")


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
