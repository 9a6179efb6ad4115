"""Tables in memory and Arrow streams: pandas, polars, pyarrow, a relation of DuckDB, and any other object
with `__arrow_c_stream__`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.sources.arrow_file import ArrowFile, Mapped
from vllm_tasks.datalayer.sources.layout import familiar, no_rows
from vllm_tasks.datalayer.sources.pandas_frame import in_arrow
from vllm_tasks.datalayer.sources.pieces import BATCH_ROWS, Piece, Pieces
from vllm_tasks.datalayer.storage_errors import plain
from vllm_tasks.errors import InvalidCall, TablesUnavailable

IN_MEMORY = ("pandas", "polars")
"""Packages whose data frames return the same rows however often they are read."""


class Frame(Pieces):
    """The rows of `data`. A data frame or table in memory is read in place. Anything else may be readable
    only once, or return other rows the next time, and is copied to a temporary file until `close`.

    A pandas index is not a column. NaN, NaT, NA and None of pandas are NULL, as pyarrow converts them.
    """

    def __init__(self, data: Any) -> None:
        """Raises `InvalidCall` if `data` is not a table."""
        _check(data)
        self._where = display_name(data)
        self._copy: ArrowFile | None = None
        self._problems: dict[str, str] = {}
        """By column, why Arrow cannot hold it."""
        with ExitStack() as opened, _errors(self._where):
            if _in_memory(data):
                self._table, self._problems = in_arrow(data)
            else:
                self._copy = ArrowFile([Mapped(_copied(data, opened), self._where)])
                ((_, schema),) = self._copy.schemas()
                self._table = schema.empty_table()
            self._opened = opened.pop_all()
        self._schema = _without_index(self._table.schema)

    def schemas(self) -> Iterator[tuple[str, pa.Schema]]:
        """See `Pieces.schemas`."""
        yield self._where, self._schema

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        """See `Source.key_types`; also refuses columns that Arrow cannot hold."""
        _refuse(key, self._problems, self._where)
        return super().key_types(key)

    def pieces(self) -> Iterator[Piece]:
        """See `Pieces.pieces`."""
        if self._copy is not None:
            yield from (Piece(self._where, self._schema, piece.at) for piece in self._copy.pieces())
        else:
            yield Piece(self._where, self._schema, self._table)

    def reading(self, rows: int) -> Any:
        """See `Pieces.reading`."""
        return _Pass(rows, self._where, self._problems) if self._copy is None else self._copy.reading(rows)

    def close(self) -> None:
        """Remove the copy."""
        self._opened.close()


class _Pass:
    """See `pieces.Pass`."""

    def __init__(self, rows: int, where: str, problems: Mapping[str, str]) -> None:
        self._rows = rows
        self._where = where
        self._problems = problems

    def batches(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `Pass.batches`."""
        _refuse(columns, self._problems, self._where)
        yield from piece.at.select(list(columns)).to_batches(max_chunksize=self._rows)

    def close(self) -> None:
        """Nothing to close."""


def _refuse(columns: Sequence[str], problems: Mapping[str, str], where: str) -> None:
    for name in columns:
        if name in problems:
            raise InvalidCall(
                f"cannot read the column {name!r} of {where}: {problems[name]:.200}; give it values of a "
                f"usual type, as by frame[{name!r}].astype(str), in polars .cast(str)"
            )


def display_name(data: Any) -> str:
    """The kind of `data`, as text for people."""
    return f"the {type(data).__module__.split('.')[0]} {type(data).__name__}"


def is_table(data: Any) -> bool:
    """Whether `data` has Arrow's stream protocol, or is one of Arrow's tables."""
    return hasattr(data, "__arrow_c_stream__") or isinstance(data, pa.RecordBatch)


def _check(data: Any) -> None:
    kind = type(data).__name__
    if kind in ("Series", "ChunkedArray"):
        raise InvalidCall(
            f"select=<{kind}> is a column, not a table: make a table with its key, as in "
            "pandas.DataFrame({'id': ..., 'text': ...})"
        )
    if not is_table(data):
        raise InvalidCall(
            "rows in memory must be a table that has __arrow_c_stream__ (pandas, polars, pyarrow, DuckDB), "
            f"not a {type(data).__name__}; convert a list of rows by pyarrow.Table.from_pylist(rows), a dict "
            "of columns by pyarrow.table(columns), a dataset by dataset.scanner().to_reader()"
        )


def _in_memory(data: Any) -> bool:
    package = type(data).__module__.split(".")[0]
    frame = package in IN_MEMORY and type(data).__name__ == "DataFrame"
    return frame or isinstance(data, pa.Table | pa.RecordBatch)


def _copied(data: Any, opened: ExitStack) -> str:
    """The path of an Arrow file with the rows of `data`; closing `opened` removes it."""
    file = tempfile.NamedTemporaryFile(prefix="vllm-tasks-", suffix=".arrow")  # noqa: SIM115 - `opened` closes it
    opened.enter_context(file)
    with pa.RecordBatchReader.from_stream(data) as reader:
        schema = _written(no_rows(reader.schema)).schema
        with pa.ipc.new_file(file.name, schema) as writer:
            for batch in reader:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    writer.write_batch(_written(batch.slice(start, BATCH_ROWS)))
    return file.name


def _written(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` for a file, without dictionaries: they may change within a stream, but not within a file."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in familiar(batch).columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _without_index(schema: pa.Schema) -> pa.Schema:
    """The schema without the columns that were the index of a pandas frame."""
    index = (schema.pandas_metadata or {}).get("index_columns", ())
    return pa.schema([field for field in schema if field.name not in index])


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Translate errors of the library that made the table and of the disk it is copied to."""
    try:
        yield
    except OSError as e:
        raise TablesUnavailable(f"cannot copy {where} to a temporary file: {plain(e):.200}") from e
    except Exception as e:  # the errors of libraries have no common base class, and they are permanent
        raise InvalidCall(f"cannot read {where}: {plain(e):.200}") from e
