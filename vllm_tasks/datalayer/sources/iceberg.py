"""Iceberg tables through pyiceberg: the rows of the current snapshot, without deleted ones."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vllm_tasks.datalayer.sources.pieces import Piece, Pieces
from vllm_tasks.datalayer.storage_errors import plain
from vllm_tasks.errors import InvalidCall, TablesUnavailable, VllmTasksError
from vllm_tasks.places import check_place, without_secrets

if TYPE_CHECKING:
    from pyiceberg.table import DataScan

METADATA = ".metadata.json"
HINT = "version-hint.text"
VERSION = re.compile(r"v?(\d+)")
"""The beginning of a metadata file's name: `v3.metadata.json`, `00003-<uuid>.metadata.json`."""


def is_iceberg(fs: Any, folder: str) -> bool:
    """Whether `folder` on the fsspec filesystem `fs` is an Iceberg table."""
    return bool(_metadata_files(fs, folder))


def _metadata_files(fs: Any, folder: str) -> list[str]:
    try:
        found = fs.ls(f"{folder.rstrip('/')}/metadata", detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in found if path.endswith(METADATA)]


class Iceberg(Pieces):
    """The table in `folder`, at the snapshot that is current when it is opened.

    A piece is a data file with its deletes. pyiceberg reads the wanted columns of a complete file at once.
    """

    def __init__(self, fs: Any, folder: str, display: str) -> None:
        """Raises `InvalidCall` if pyiceberg is not installed or cannot read the table."""
        self._display = display
        try:
            from vllm_tasks.datalayer.sources.iceberg_files import LakeFiles, table
        except ImportError as e:
            raise InvalidCall(
                f"{display} is an Iceberg table, which needs pyiceberg: pip install 'vllm-tasks[iceberg]'"
            ) from e
        with self._errors():
            self._table = table(LakeFiles(fs), _newest(fs, folder))
            self._tasks = list(self._scan(("*",)).plan_files())
        for task in self._tasks:
            self._check_place(fs, folder, task.file.file_path)

    def _check_place(self, fs: Any, folder: str, path: str) -> None:
        if not str(fs._strip_protocol(path)).startswith(folder.rstrip("/") + "/"):
            check_place(f"of the Iceberg table {self._display} the data file", path)

    def _scan(self, columns: Sequence[str]) -> DataScan:
        return self._table.scan(selected_fields=tuple(columns))

    def schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        """See `Pieces.schemas`."""
        yield self._display, self._schema

    @cached_property
    def _schema(self) -> pa.Schema:
        from pyiceberg.io.pyarrow import schema_to_pyarrow

        with self._errors():
            return schema_to_pyarrow(self._scan(("*",)).projection(), include_field_ids=False)

    def pieces(self) -> Iterator[Piece]:
        """See `Pieces.pieces`."""
        for task in self._tasks:
            yield Piece(without_secrets(task.file.file_path), self._schema, task)

    def reading(self, rows: int) -> _Pass:
        """See `Pieces.reading`."""
        return _Pass(self, rows)

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Pass.batches`."""
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan

        # The table's own scan would read all files at once and keep their results in memory.
        projection = self._scan(columns or piece.schema.names[:1]).projection()
        with self._errors():
            yield from ArrowScan(
                self._table.metadata, self._table.io, projection, AlwaysTrue()
            ).to_record_batches([piece.at])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except VllmTasksError:
            raise
        except FileNotFoundError as e:
            raise InvalidCall(
                f"the Iceberg table {self._display} lacks a file that its metadata names: {plain(e):.300}; a "
                "table names its files by absolute paths, and cannot be read after it was moved or copied"
            ) from e
        except (OSError, ConnectionError) as e:
            raise TablesUnavailable(f"cannot read the Iceberg table {self._display}: {plain(e):.300}") from e
        except Exception as e:  # the errors of pyiceberg, Arrow and pydantic have no common base class
            raise InvalidCall(f"cannot read the Iceberg table {self._display}: {plain(e):.300}") from e


class _Pass:
    """See `pieces.Pass`."""

    def __init__(self, source: Iceberg, rows: int) -> None:
        self._source = source
        self._rows = rows

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Pass.batches`."""
        for batch in self._source.batches(piece, columns):
            for start in range(0, batch.num_rows, self._rows):
                yield batch.slice(start, self._rows).select(columns)

    def close(self) -> None:
        """Nothing to close."""


def _newest(fs: Any, folder: str) -> str:
    """The path of the metadata file that the hint names, or of the one with the highest version."""
    files = _metadata_files(fs, folder)
    hint = f"{folder.rstrip('/')}/metadata/{HINT}"
    if fs.exists(hint):
        version = fs.cat_file(hint).decode().strip().removesuffix(METADATA)
        named = [
            path
            for path in files
            if posixpath.basename(path) in (f"v{version}{METADATA}", version + METADATA)
        ]
        if named:
            return named[0]
    return max(files, key=lambda path: (_version(path), fs.modified(path)))


def _version(path: str) -> int:
    match = VERSION.match(posixpath.basename(path))
    return int(match[1]) if match else -1
