"""Arrow IPC: files (`.arrow`, `.feather` of version 2) and streams, with or without compressed buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from vllm_tasks.datalayer.sources.data_file import POINTER, DataFile
from vllm_tasks.datalayer.sources.pieces import Piece, Pieces, reading_errors
from vllm_tasks.errors import InvalidCall

MAGIC = b"ARROW1"
"""The first bytes of a file; a stream has no such mark."""
FEATHER_1 = b"FEA1"


@dataclass(frozen=True)
class Mapped:
    """An Arrow file on this machine, which is mapped into memory."""

    path: str
    display: str


class ArrowFile(Pieces):
    """The files of a table. A piece is a batch of a file, or a complete stream, read from its start."""

    def __init__(self, files: Sequence[DataFile | Mapped]) -> None:
        self._files = files

    def schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        """See `Pieces.schemas`."""
        for file in self._files:
            with ExitStack() as opened, reading_errors(file.display):
                schema = _reader(file, opened, None).schema
            yield file.display, schema

    def pieces(self) -> Iterator[Piece]:
        """See `Pieces.pieces`."""
        for file in self._files:
            with ExitStack() as opened, reading_errors(file.display):
                reader = _reader(file, opened, None)
                schema = reader.schema
                batches = range(reader.num_record_batches) if _is_file(reader) else [None]
            yield from (Piece(file.display, schema, (file, batch)) for batch in batches)

    def reading(self, rows: int) -> _Pass:
        """See `Pieces.reading`."""
        return _Pass(rows)


class _Pass:
    """See `pieces.Pass`; one file is open at a time."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._opened = ExitStack()
        self._open: tuple[DataFile | Mapped, Sequence[str]] | None = None
        self._reader: Any = None

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Pass.batches`."""
        file, number = piece.at
        if self._open != (file, columns) or number is None:  # a stream can be read only once
            self.close()
            # With an empty list Arrow would read all columns.
            included = [piece.schema.get_field_index(name) for name in columns] or [0]
            self._reader = _reader(file, self._opened, pa.ipc.IpcReadOptions(included_fields=included))
            self._open = (file, columns)
        for batch in self._reader if number is None else [self._reader.get_batch(number)]:
            for start in range(0, batch.num_rows, self._rows):
                yield batch.slice(start, self._rows).select(columns)

    def close(self) -> None:
        """See `Pass.close`."""
        self._opened.close()
        self._opened, self._open, self._reader = ExitStack(), None, None


def _reader(file: DataFile | Mapped, opened: ExitStack, options: Any) -> Any:
    """A reader of a file or stream, which `opened` closes; raises `InvalidCall` for Feather version 1."""
    raw = opened.enter_context(_raw(file))
    beginning = raw.read(len(POINTER))
    raw.seek(0)
    if isinstance(file, DataFile):
        file.refuse_pointer(beginning)
    if beginning.startswith(FEATHER_1):
        raise InvalidCall(
            f"{file.display} is a file of Feather version 1, which is not supported; write it again with "
            "pyarrow.feather.write_feather(pyarrow.feather.read_table(old), new)"
        )
    opening = pa.ipc.open_file if beginning.startswith(MAGIC) else pa.ipc.open_stream
    return opened.enter_context(opening(raw, options=options))


def _raw(file: DataFile | Mapped) -> Any:
    if isinstance(file, Mapped) or isinstance(file.fs, LocalFileSystem):
        return pa.memory_map(file.path)
    return file.seekable()


def _is_file(reader: Any) -> bool:
    return isinstance(reader, pa.ipc.RecordBatchFileReader)
