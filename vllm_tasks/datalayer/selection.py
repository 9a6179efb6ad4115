"""Which rows of a source are asked, and the seam to where tables live: `Tables` and its `Writer`.

Two kinds: `lake` (a folder or an fsspec URL) and `database` (a SQLAlchemy URL).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.rows import BuiltinType

Refresh = Literal["missing", "changed", "failed", "all"]
"""`missing`: no row in the outputs under the present fingerprint; `changed`: all rows, with the hash of
the input that their output was made of, for the caller to compare; `failed`: the outputs hold an error,
under any fingerprint; `all`: every row."""

Key = tuple[Any, ...]
Row = Mapping[str, Any]

POSITION = "_position"
PAGE = 1000
"""Rows in a list of `Tables.read`, at most."""
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
"""What every outputs table has after the key, the output and, when flattened, `_position`.
Timestamps are in UTC, with microseconds."""


@dataclass(frozen=True)
class Selection:
    """Rows of a source, joined with the outputs that there are already."""

    select: str
    """A table, in a lake also a path or glob, or one SELECT statement."""
    key: tuple[str, ...]
    """Columns that identify a row."""
    columns: tuple[str, ...]
    """Columns whose values are wanted; may repeat those of the key."""
    outputs: str
    """Name of the outputs table; it need not exist yet."""
    fingerprint: str
    refresh: Refresh = "missing"
    ids: tuple[Key, ...] | None = None
    """Only rows with one of these keys; each a tuple with one value per column of the key."""
    shard: tuple[int, int] | None = None
    """(i, n): only the i-th, from 0, of n parts of the rows, told by a hash of their keys."""
    since: datetime | None = None
    """With `failed` and `all`: leave out what was committed under the fingerprint at or after this time.
    Set when a run goes on after a lost connection."""

    @property
    def shown(self) -> str:
        """The source as a person is told it: a long statement by its beginning."""
        return self.select if len(self.select) <= 200 else f"{self.select[:200]}..."


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row to ask. `values` are in the order of the selection's columns, as Python values."""

    key: Key
    values: tuple[Any, ...]
    redo: bool
    """The outputs hold this key already, under whatever fingerprint."""
    input_hash: str | None
    """Of the output there, when it was made under the present fingerprint."""
    error: str | None = None
    """Why the row could not be read, in words of bounded length; `values` is empty then."""

    @property
    def replaces_earlier(self) -> bool:
        """Whether the output there was made under another fingerprint."""
        return self.redo and self.input_hash is None


@dataclass(frozen=True)
class OutputColumn:
    """A column of what the model said."""

    name: str
    kind: BuiltinType


@dataclass(frozen=True)
class OutputTable:
    """What an outputs table looks like: key, `columns`, `_position` when flattened, `OWN_COLUMNS`."""

    name: str
    columns: tuple[OutputColumn, ...]
    flatten: bool = False
    partition_by: tuple[str, ...] = ()
    """Lake only."""
    compression: str | None = None
    """Lake only: Parquet's codec; None is `zstd`."""


class Writer(Protocol):
    """Commits groups of finished rows; used by one thread at a time."""

    def commit(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        """Write `rows` in one transaction; what the outputs hold under the keys in `redo` goes with it.

        A row has a value for every column of the table: Python values, None for NULL, anything that
        JSON can say in a `json` column. Rows of one key (with `flatten`) are in one call. Keys that a
        rival committed meanwhile are replaced too: the last commit wins, whole. After an error nothing
        of the call is written, and the same call may be repeated; where it had been written although
        the acknowledgement was lost, the repetition replaces it.

        Raises `TablesUnavailable` for what may pass (a lost connection, a full disk, a lock).
        """

    def unstorable(self, row: Row) -> str | None:
        """Why the table could not hold this row, naming the column; None when it can.

        A row that cannot would fail its whole commit: write an error in its place.
        """

    def close(self) -> None:
        """Tidy up; the last commit has been made."""


class Tables(Protocol):
    """One lake or database. `rows`, `count` and a writer are each used by a thread of their own."""

    def check(self, selection: Selection) -> None:
        """Refuse (`InvalidCall`) a source or column that is not there, a `select` that is more than one
        SELECT, an outputs table of another shape (see `writer`), keys that are NULL or not unique (with
        their count and an example)."""

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        """The selected rows in lists of up to `size`, streamed, in no particular order. Closing the
        iterator ends the query. Raises `TablesUnavailable` when the connection is lost."""

    def count(self, selection: Selection) -> tuple[int, int]:
        """How many rows the source has (with the `ids`), and how many of them are selected."""

    def unreadable(self) -> Unreadable:
        """The rows without a readable key that the latest `rows` has come to so far."""

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        """Make the outputs table unless it is there, and a writer to it.

        Call it before `rows`. Raises `InvalidCall` when the table is there with other columns or types,
        naming them and the way out: another `predict_id`.
        """

    def outputs(self, name: str) -> Any:
        """The outputs table `name`, whole, as a `pyarrow.Table`. JSON columns are text there.

        Raises `InvalidCall` when there is no such table.
        """

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        """The rows of a source as mappings of column to Python value, streamed in lists, in no particular
        order: these columns, or all. Values are as `rows` has them, but those of a table of SQLite's are of
        its declared types, bools and times among them.

        Raises `InvalidCall` for a source or column that is not there and two columns of one name,
        `TablesUnavailable`.
        """

    def has(self, name: str) -> bool:
        """Whether there is a table `name`, so that `read(name)` finds one."""

    def quoted(self, name: str) -> str:
        """The outputs `name` as a SELECT of `read` names them, with their schema where they are in one."""

    def put(self, name: str, rows: Any, key: Sequence[str]) -> None:
        """Write a `pyarrow.Table` in one transaction to the table `name`, made unless it is there: rows of
        a key that is there already are replaced, so that the same call may be repeated.

        Types are int64, float64, bool, string and timestamp in UTC with microseconds; values of `key` are
        never NULL or floats, and no key is there twice. `outputs(name)` has the same types again. Raises
        `InvalidCall` for other rows and when the table is there with other columns or types,
        `TablesUnavailable`.
        """

    def read_from(self, name: str) -> str:
        """Where a person finds the source `name`, as `where` for outputs."""

    def where(self, name: str) -> str:
        """Where a person finds the outputs: a path or URL and a table, without secrets."""

    def close(self) -> None:
        """Release connections."""
