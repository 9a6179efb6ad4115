"""Sources in pieces: row groups of Parquet files, batches of Arrow, files of an Iceberg table.

One pass over a source reads keys, another one values, both from the files as they are. The values of a part
are read only from pieces that have a wanted row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer.sources import PART_BYTES, PART_ROWS, Part, Unreadable, Values
from vllm_tasks.datalayer.sources.arrow import count_unreadable
from vllm_tasks.datalayer.sources.keys import cast_keys, fitting, key_type, known
from vllm_tasks.datalayer.sources.layout import familiar, split
from vllm_tasks.datalayer.sources.widest import widest
from vllm_tasks.datalayer.storage_errors import plain
from vllm_tasks.datalayer.values import python
from vllm_tasks.errors import InvalidCall, TablesUnavailable, VllmTasksError

BATCH_ROWS = 1024
"""Maximum rows of values read at once, whatever their average size: when pyarrow writes, it checks the size
of a page only every so many rows."""
KEY_ROWS = 1 << 16
"""Rows of keys read at once."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows that are read together."""

    where: str
    """The file, as text for people."""
    schema: pa.Schema
    at: Any
    """The position of the piece, in the form that its `Pass` needs."""


class Pass(Protocol):
    """One reading of some columns, piece after piece."""

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns, which the piece has, of all its rows in order; with no columns, batches of the same
        number of rows."""

    def close(self) -> None:
        """Close open files."""


class Pieces:
    """A `Source` in pieces; a subclass lists the pieces and reads them."""

    def schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        """The name and schema of every file."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """All pieces, each time in the same order."""
        raise NotImplementedError

    def reading(self, rows: int) -> Pass:
        """A new pass in batches of at most `rows`: `BATCH_ROWS` of values or `KEY_ROWS` of keys."""
        raise NotImplementedError

    def close(self) -> None:
        """See `Source.close`."""

    def columns(self) -> Sequence[str]:
        """See `Source.columns`: those of the first file, then additional ones of other files."""
        return list(dict.fromkeys(name for _, schema in self.schemas() for name in schema.names))

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        """See `Source.key_types`; if the files' types differ, one that holds the keys of all."""
        found: dict[str, tuple[str, pa.DataType]] = {}
        for where, schema in self.schemas():
            for name in key:
                field = _only(schema, name, where)
                if field is None or pa.types.is_null(field.type):  # no row of the file has a key
                    continue
                stored = key_type(name, field.type)
                before = found.setdefault(name, (where, stored))
                if before[1] != stored:
                    found[name] = (before[0], widest(name, before, (where, stored)))
        return [found[name][1] if name in found else key_type(name, pa.null()) for name in key]

    def identified_by(self, key: Sequence[str]) -> bool:
        """See `Source.identified_by`: files guarantee nothing."""
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        """See `Source.keys`."""
        with closing(self.reading(KEY_ROWS)) as reading:
            for piece in self.pieces():
                for batch in read(reading, piece, key.names):
                    yield fitting(_keys(batch, key), key)

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        """See `Source.parts`."""
        cursor = Cursor(self.reading(BATCH_ROWS), columns)
        with closing(self.reading(KEY_ROWS)) as reading, closing(cursor):
            part = _Gathered(key, cursor)
            for piece in self.pieces():
                start = 0
                for batch in read(reading, piece, key.names):
                    if part.full:
                        yield part.made()
                        part = _Gathered(key, cursor)
                    part.add(piece, start, batch, unreadable)
                    start += batch.num_rows
            yield part.made()


class _Gathered:
    """The keys of the part under construction, and the positions of their rows."""

    def __init__(self, key: pa.Schema, cursor: Cursor) -> None:
        self._key = key
        self._cursor = cursor
        self._keys = [key.empty_table()]
        self._spans: list[tuple[Piece, np.ndarray]] = []
        """For each batch of keys, its piece and the numbers in the piece of the rows with a key."""
        self._rows = self._bytes = 0

    @property
    def full(self) -> bool:
        return self._rows > PART_ROWS - KEY_ROWS or self._bytes > PART_BYTES

    def add(self, piece: Piece, start: int, batch: pa.RecordBatch, unreadable: Unreadable) -> None:
        """Add the keys in `batch`, those of the rows of `piece` from `start` on."""
        kept = np.arange(batch.num_rows)
        if self._key.names:
            keys, wrong = cast_keys(_keys(batch, self._key), self._key)
            kept = known(keys)
            if len(kept) < keys.num_rows:
                count_unreadable(keys, wrong, kept.tolist(), unreadable, piece.where)
                keys = keys.take(pa.array(kept))
            self._keys.append(keys)
            self._bytes += keys.nbytes
        self._spans.append((piece, kept + start))
        self._rows += len(kept)

    def made(self) -> Part:
        return Part(pa.concat_tables(self._keys), self._values, rows=self._rows)

    def _values(self, rows: Sequence[int]) -> Iterator[list[Values]]:
        wanted, first = np.asarray(rows, dtype=np.int64), 0
        for piece, numbers in self._spans:
            end = np.searchsorted(wanted, first + len(numbers))
            if end:
                yield from self._cursor.values(piece, numbers[wanted[:end] - first])
                wanted = wanted[end:]
            first += len(numbers)


class Cursor:
    """Reads values forward: the next part continues in the piece in which the last one ended."""

    def __init__(self, reading: Pass, columns: Sequence[str]) -> None:
        self._reading = reading
        self._columns = columns
        self._piece: Piece | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._start = 0
        """The number of the batch's first row in the piece."""

    def values(self, piece: Piece, wanted: np.ndarray) -> Iterator[list[Values]]:
        """The values of the rows of `piece` with these numbers, ascending and not requested before."""
        if piece is not self._piece:
            self._piece, self._start, self._batch = piece, 0, None
            self._batches = read(self._reading, piece, self._columns)
        while len(wanted):
            batch = self._batch
            end = self._start + (batch.num_rows if batch is not None else 0)
            if batch is not None and (count := np.searchsorted(wanted, end)):
                yield from self._lists(batch, wanted[:count] - self._start)
                wanted = wanted[count:]
            else:
                self._start = end
                self._batch = next(self._batches, None)
                if self._batch is None:
                    raise TablesUnavailable(f"{piece.where} was changed while it was read: it has fewer rows")

    def _lists(self, batch: pa.RecordBatch, wanted: np.ndarray) -> Iterator[list[Values]]:
        if not batch.num_columns:  # Arrow cannot take rows of a batch without columns
            yield [(None,) * len(self._columns)] * len(wanted)
            return
        yield from map(self._rows, split(batch.take(pa.array(wanted)), PART_BYTES))

    def _rows(self, batch: pa.RecordBatch) -> list[Values]:
        names = set(batch.schema.names)
        missing = [None] * batch.num_rows
        found = [python(batch[name]) if name in names else missing for name in self._columns]
        return list(zip(*found, strict=True))

    def close(self) -> None:
        self._batch = None
        self._reading.close()


def read(reading: Pass, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The batches of a piece, with those of `columns` that it has, perhaps none."""
    there = [name for name in dict.fromkeys(columns) if _only(piece.schema, name, piece.where) is not None]
    with reading_errors(piece.where):
        for batch in reading.batches(piece, there):
            yield familiar(batch)


def _only(schema: pa.Schema, name: str, where: str) -> pa.Field | None:
    """The column of this name, None if there is none; raises `InvalidCall` if there are several."""
    found = schema.get_all_field_indices(name)
    if len(found) > 1:
        raise InvalidCall(f"{where} has {len(found)} columns {name!r}; give each another name")
    return schema.field(found[0]) if found else None


def _keys(batch: pa.RecordBatch, key: pa.Schema) -> pa.Table:
    names = set(batch.schema.names)
    missing = {f.name: pa.nulls(batch.num_rows, f.type) for f in key if f.name not in names}
    return pa.table({name: missing[name] if name in missing else batch[name] for name in key.names})


@contextmanager
def reading_errors(where: str) -> Iterator[None]:
    """Translate errors of the file `where`, of its filesystem and of Arrow into ours."""
    try:
        yield
    except VllmTasksError:
        raise
    except PermissionError as e:
        raise InvalidCall(f"cannot read {where}: not allowed: {plain(e)}") from e
    except MemoryError as e:
        raise InvalidCall(f"cannot read {where}: there is not enough memory: {plain(e)}") from e
    except pa.ArrowException as e:
        raise InvalidCall(f"cannot read {where}: {plain(e):.500}") from e
    except Exception as e:  # the errors of filesystems have no common base class
        # Arrow raises OSError for damaged contents and for lost files; only the latter has an errno.
        damaged = type(e) is OSError and e.errno is None
        raise (InvalidCall if damaged else TablesUnavailable)(f"cannot read {where}: {plain(e):.500}") from e
