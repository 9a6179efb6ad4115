"""The selection of rows to process, and the interface to tables: `Tables` and its `Writer`.

Two rooms implement it: `lake` (a folder or an fsspec URL) and `database` (a SQLAlchemy URL).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.rows import BuiltinType, ColumnKind

Refresh = Literal["missing", "changed", "failed", "all"]
"""`missing`: rows without an output under the present fingerprint; `changed`: all rows, with the hash of
the input that their output was made from, for the caller to compare; `failed`: rows whose output is an error,
under any fingerprint; `all`: every row."""

Key = tuple[Any, ...]
Shard = tuple[int, int]
"""(i, n): the i-th, from 0, of n parts of the rows, chosen by a hash of their keys."""
Row = Mapping[str, Any]

POSITION = "_position"
PAGE = 1000
"""Maximum number of rows in a list of `Tables.read`."""
OWN_COLUMNS: dict[str, BuiltinType | Literal["timestamp"]] = {
    "_error": "str",
    "_finish_reason": "str",
    "_prompt_tokens": "int",
    "_completion_tokens": "int",
    "_seconds": "float",
    "_model": "str",
    "_uuid": "str",
    "_fingerprint": "str",
    "_input_hash": "str",
    "_created_at": "timestamp",
    "_source": "str",
}
"""Columns of every outputs table after the key, the output and, when flattened, `_position`.
Timestamps are in UTC, with microseconds."""


@dataclass(frozen=True)
class Selection:
    """The rows of a source to process, found by a join with the outputs that exist."""

    select: str
    """A table, in a lake also a path or glob, or one SELECT statement."""
    key: tuple[str, ...]
    """Columns that identify a row."""
    columns: tuple[str, ...]
    """Columns whose values are read; may repeat those of the key."""
    outputs: str
    """Name of the outputs table; it need not exist yet."""
    fingerprint: str
    refresh: Refresh = "missing"
    ids: tuple[Key, ...] | None = None
    """Only rows with one of these keys; each a tuple with one value per column of the key."""
    shard: Shard | None = None
    """Only rows of this shard."""
    since: datetime | None = None
    """With `failed` and `all`: leave out rows committed under the fingerprint at or after this time.
    Set when a run resumes after a lost connection."""
    name: str | None = None
    """What people know the source as; None: its `select`."""

    @property
    def display(self) -> str:
        """The source as text for people; a long statement is truncated."""
        text = self.name or self.select
        return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row to process. `values` are Python values in the order of the selection's columns."""

    key: Key
    values: tuple[Any, ...]
    redo: bool
    """The outputs hold this key already, under any fingerprint."""
    input_hash: str | None
    """Input hash of the existing output, if it was made under the present fingerprint."""
    error: str | None = None
    """Why the row could not be read, as text of bounded length; `values` is empty then."""

    @property
    def replaces_earlier(self) -> bool:
        """Whether the existing output was made under another fingerprint."""
        return self.redo and self.input_hash is None


@dataclass(frozen=True)
class OutputColumn:
    """A column of the model's output."""

    name: str
    kind: ColumnKind


CLASS_COLUMNS = (
    OutputColumn("label", "str"),
    OutputColumn("probability", "float"),
    OutputColumn("probabilities", "json"),
)
"""The columns of answers that name a class with its probability."""
REVIEW = "_review"
"""The column that marks answers for a person; it follows `CLASS_COLUMNS`."""


@dataclass(frozen=True)
class OutputTable:
    """The shape of an outputs table: key, `columns`, `_position` when flattened, `OWN_COLUMNS`."""

    name: str
    columns: tuple[OutputColumn, ...]
    flatten: bool = False
    partition_by: tuple[str, ...] = ()
    """Lake only."""
    compression: str | None = None
    """Lake only: Parquet's codec; None is `zstd`."""


class Writer(Protocol):
    """Commits groups of finished rows; used by one thread at a time."""

    def commit(
        self, rows: Sequence[Row], redo: Collection[Key], before: Callable[[], None] | None = None
    ) -> None:
        """Write `rows` in one transaction, in which existing outputs of the keys in `redo` are removed.

        A row has a value for every column of the table: Python values, None for NULL, and for a `json` column
        any value that JSON can express. All rows of one key (with `flatten`) are in one call. Keys that a
        concurrent writer committed meanwhile are replaced, too: the last commit wins, completely. After an
        error nothing of the call is written, and it may be repeated; if it was written but the
        acknowledgement was lost, the repetition replaces it.

        `before` is called before each attempt to write, and ends the commit by raising. Nobody commits
        between its return and the write. (In a database a lock holds others off; in a lake the attempt fails
        then, and the next one calls it again.)

        Raises `TablesUnavailable` for temporary failures (a lost connection, a full disk, a lock).
        """

    def unstorable(self, row: Row) -> str | None:
        """Why the table cannot hold this row, naming the column; None if it can.

        Such a row would fail its complete commit: write an error in its place.
        """

    def close(self) -> None:
        """Clean up after the last commit."""


class Tables(Protocol):
    """One lake or database. `rows`, `count` and a writer each run in their own thread."""

    def check(self, selection: Selection) -> None:
        """Raise `InvalidCall` for a missing source or column, a `select` that is more than one SELECT, an
        outputs table of another shape (see `writer`), and keys that are NULL or not unique (with their
        number and an example)."""

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        """Stream the selected rows in lists of up to `size`, in no particular order. Closing the
        iterator ends the query. Raises `TablesUnavailable` when the connection is lost."""

    def count(self, selection: Selection) -> tuple[int, int]:
        """Count the rows of the source (with the `ids`), and those of them that are selected."""

    def unreadable(self) -> Unreadable:
        """The rows without a readable key that the latest `rows` has met so far."""

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        """Create the outputs table unless it exists, and return a writer to it.

        Call it before `rows`. Raises `InvalidCall` when the table exists with other columns or types,
        naming them and the way out: another `predict_id`.
        """

    def check_outputs(self, selection: Selection, table: OutputTable) -> None:
        """Raise what `writer` would raise for these outputs, as far as that shows before they are created."""

    def outputs(self, name: str) -> Any:
        """The complete outputs table `name` as a `pyarrow.Table`, with JSON columns as text.

        Raises `InvalidCall` when there is no such table.
        """

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        """Stream the rows of a source in lists, in no particular order, as mappings of column to Python
        value: the given columns, or all. Values are those of `rows`, except that values of an SQLite table
        have its declared types, including bools and times.

        Raises `InvalidCall` for a missing source or column and for two columns of one name,
        `TablesUnavailable`.
        """

    def stored(self, name: str, columns: str, where: str) -> list[Row]:
        """Rows of a table that a writer or `put` has written, none if it does not exist.

        `columns` and `where` are SQL, between SELECT and FROM and after WHERE. Raises `TablesUnavailable`.
        """

    def has(self, name: str) -> bool:
        """Whether there is a table `name` that `read(name)` would find."""

    def put(self, name: str, rows: Any, key: Sequence[str]) -> None:
        """Write a `pyarrow.Table` to the table `name` in one transaction, creating it unless it exists. Rows
        whose key exists already are replaced, so that the same call may be repeated.

        Types are int64, float64, bool, string and timestamp in UTC with microseconds; values of `key` are
        never NULL or floats, and each key occurs once. `outputs(name)` returns the same types. Raises
        `InvalidCall` for other rows and when the table exists with other columns or types,
        `TablesUnavailable`.
        """

    def read_from(self, name: str) -> str:
        """The place of the source `name`, as text for people, like `where` for outputs."""

    def where(self, name: str) -> str:
        """The place of the outputs, as text for people: a path or URL and a table, without secrets."""

    def close(self) -> None:
        """Release connections."""
