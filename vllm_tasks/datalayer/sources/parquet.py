"""Parquet files through pyarrow: a piece is a row group, read in batches of the wanted columns only."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from vllm_tasks.datalayer.sources import PART_BYTES
from vllm_tasks.datalayer.sources.data_file import POINTER, DataFile
from vllm_tasks.datalayer.sources.hive import Partition
from vllm_tasks.datalayer.sources.int96 import exact
from vllm_tasks.datalayer.sources.layout import VALUE_BYTES
from vllm_tasks.datalayer.sources.pieces import BATCH_ROWS, Piece, Pieces, reading_errors
from vllm_tasks.errors import InvalidCall

BUFFER_BYTES = 1 << 20
"""Bytes of a column that are read at once; without a limit Arrow reads the complete column of a row group."""
FOOTERS_BYTES = 32 << 20
"""Bytes of footers, as stored in the files, that are kept; others are read again for each pass."""
FOOTERS_AT_ONCE = 16
"""Files whose footers are read at once."""
REPEATED_ROWS = 64
"""Minimum rows read at once of texts in a dictionary, which many rows may share: writers end it at 1 MB."""


class Parquet(Pieces):
    """The files of a table. Columns are matched by name; values are as their own file has them, whatever the
    types in the others."""

    def __init__(self, files: Sequence[DataFile], partitions: Sequence[Partition] = ()) -> None:
        """`partitions` has the partition of each file, if there are any."""
        self._files = files
        self._partitions = partitions or [{} for _ in files]
        self._footers = _Footers()

    def schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        """See `Pieces.schemas`."""
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = pool.map(self._footers.of, self._files)
            for file, footer, partition in zip(self._files, footers, self._partitions, strict=True):
                yield file.display, _with(footer.schema, partition)

    def pieces(self) -> Iterator[Piece]:
        """See `Pieces.pieces`."""
        for file, partition in zip(self._files, self._partitions, strict=True):
            footer = self._footers.of(file)
            schema = _with(footer.schema, partition)
            for group in range(footer.metadata.num_row_groups):
                yield Piece(file.display, schema, (file, footer, group, partition))

    def reading(self, rows: int) -> _Pass:
        """See `Pieces.reading`."""
        return _Pass(rows)


@dataclass(frozen=True)
class _Footer:
    """The description of a file's row groups and columns."""

    metadata: pq.FileMetaData
    schema: pa.Schema


class _Footers:
    """The footers that were read last, up to `FOOTERS_BYTES`. Threads share it, under `_lock`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Footer] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def of(self, file: DataFile) -> _Footer:
        with self._lock:
            kept = self._kept.get(file.path)
        if kept is not None:
            return kept
        with reading_errors(file.display), ExitStack() as opened:
            try:
                found = _open(file, opened)
            except pa.ArrowInvalid:
                with file.seekable() as stream:
                    file.refuse_pointer(stream.read(len(POINTER)))
                raise
            footer = _Footer(found.metadata, found.schema_arrow)
        with self._lock:
            if file.path not in self._kept:
                self._kept[file.path] = footer
                self._bytes += footer.metadata.serialized_size
            while self._bytes > FOOTERS_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].metadata.serialized_size
        return footer


def _with(schema: pa.Schema, partition: Partition) -> pa.Schema:
    own = [field for field in schema if field.name not in partition]
    return pa.schema([*own, *((name, pa.string()) for name in partition)])


def _open(file: DataFile, opened: ExitStack, **options: Any) -> pq.ParquetFile:
    """The file, which `opened` closes."""
    local = isinstance(file.fs, LocalFileSystem)
    raw = opened.enter_context(pa.OSFile(file.path) if local else file.seekable())
    return opened.enter_context(pq.ParquetFile(raw, pre_buffer=False, **options))


class _Pass:
    """See `pieces.Pass`; one file is open at a time."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._opened = ExitStack()
        self._open: tuple[DataFile, Sequence[str]] | None = None
        self._readers: list[pq.ParquetFile] = []
        self._leaves: list[int] = []

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Pass.batches`."""
        file, footer, group, partition = piece.at
        own = [name for name in columns if name not in partition]
        if self._open != (file, own):
            self._reopen(file, footer, own)
        rows = self._rows_at_once(footer.metadata.row_group(group))
        found = [
            # One thread: several would save no time and need more memory.
            reader.iter_batches(rows, row_groups=[group], columns=own, use_threads=False)
            for reader in self._readers
        ]
        # Arrow names a struct's fields with a point: reading "a" also returns a column "a.b" if it exists.
        for some in zip(*found, strict=True):
            batch = exact(*(batch.select(own) for batch in some)) if some[1:] else some[0].select(own)
            yield _filled(batch, columns, partition) if partition else batch

    def _reopen(self, file: DataFile, footer: _Footer, columns: Sequence[str]) -> None:
        self.close()
        self._leaves = _leaves(footer.metadata, set(columns))
        _refuse_spans(file, footer.metadata, self._leaves)
        _refuse_variants(file, footer, columns)
        kinds = {footer.metadata.schema.column(leaf).physical_type for leaf in self._leaves}
        # Keys have microseconds. Values are read in both units, because a column of INT96 may need both.
        units = ["us"] if self._rows > BATCH_ROWS else ["ns", "us"] if "INT96" in kinds else ["ns"]
        for unit in units:
            options = {"metadata": footer.metadata, "buffer_size": BUFFER_BYTES}
            self._readers.append(_open(file, self._opened, coerce_int96_timestamp_unit=unit, **options))
        self._open = (file, columns)

    def _rows_at_once(self, group: pq.RowGroupMetaData) -> int:
        """The number of rows in about `PART_BYTES`, as far as it is known before reading."""
        size, repeated = 0, 0
        for chunk in map(group.column, self._leaves):
            size += chunk.total_uncompressed_size + VALUE_BYTES * chunk.num_values
            if chunk.has_dictionary_page and chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
                repeated += chunk.total_uncompressed_size  # each row may refer to all of it
        rows: int = min(self._rows, PART_BYTES * group.num_rows // max(1, size))
        if repeated and self._rows <= BATCH_ROWS:  # keys are unique, so a dictionary does not repeat them
            rows = min(rows, max(REPEATED_ROWS, PART_BYTES // repeated))
        return max(1, rows)

    def close(self) -> None:
        """See `Pass.close`."""
        self._opened.close()
        self._opened, self._open, self._readers = ExitStack(), None, []


def _filled(batch: pa.RecordBatch, columns: Sequence[str], partition: Partition) -> pa.RecordBatch:
    """The columns of the file, `batch`, together with those of its folder."""
    made = {name: pa.repeat(pa.scalar(partition[name], pa.string()), batch.num_rows) for name in partition}
    if not columns:
        return batch
    return pa.RecordBatch.from_arrays(
        [made[name] if name in made else batch[name] for name in columns], names=list(columns)
    )


def _refuse_spans(file: DataFile, metadata: pq.FileMetaData, leaves: Collection[int]) -> None:
    for column in map(metadata.schema.column, leaves):
        if column.converted_type == "INTERVAL":  # Arrow would read it as bytes
            raise InvalidCall(
                f"the column {column.path!r:.100} of {file.display} has Parquet's type INTERVAL, which Arrow "
                "lacks; read it as text, with SELECT CAST(... AS VARCHAR)"
            )


def _refuse_variants(file: DataFile, footer: _Footer, columns: Sequence[str]) -> None:
    for name in columns:
        kind = footer.schema.field(name).type
        # Arrow reads them as the bytes of their encoding; only the text of the stored schema has their type.
        if (
            pa.types.is_struct(kind)
            and kind.get_field_index("metadata") >= 0
            and re.search(rf" {re.escape(name)} \(Variant", str(footer.metadata.schema))
        ):
            raise InvalidCall(
                f"the column {name!r:.100} of {file.display} has Parquet's type VARIANT, which Arrow lacks; "
                "read it as JSON, with a SELECT"
            )


def _leaves(metadata: pq.FileMetaData, columns: set[str]) -> list[int]:
    """The numbers of the stored columns of `columns`: a struct has several."""
    return [
        leaf
        for leaf in range(metadata.num_columns)
        if any(prefix in columns for prefix in _prefixes(metadata.schema.column(leaf).path))
    ]


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[:count]) for count in range(1, len(names) + 1))
