"""Tables whose source is in one place and whose outputs are in another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from vllm_tasks.datalayer.join import Join, Outputs
from vllm_tasks.datalayer.selection import Key, OutputTable, Row, Selection, Shard, SourceRow, Writer
from vllm_tasks.datalayer.sources import Source, Unreadable
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import TablesUnavailable


class NoRows:
    """The `Writer` for a source without rows and without outputs: the types of its keys are unknown."""

    def __init__(self, display: str) -> None:
        self._display = display

    def commit(
        self, rows: Sequence[Row], redo: Collection[Key], before: Callable[[], None] | None = None
    ) -> None:
        """See `Writer.commit`; there is nothing to commit."""
        if rows or redo:
            raise TablesUnavailable(f"the source in {self._display!r} had no rows, and has some now")

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`."""

    def close(self) -> None:
        """See `Writer.close`."""


class Home(Outputs, Protocol):
    """A store that keeps outputs of any source."""

    @property
    def workspace(self) -> Workspace:
        """The workspace that joins rows with their outputs; it may read them, and closes with the store."""

    def writer_of(
        self, types: pa.Schema, key: Sequence[str], table: OutputTable, shard: Shard | None
    ) -> Writer:
        """As `Tables.writer`, for a key of these Arrow types; they are empty if the source has no rows.

        The writer is given rows of `shard` alone, unless it is None.
        """

    def check_outputs_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> None:
        """As `Tables.check_outputs`, for a key of these Arrow types."""

    def outputs(self, name: str) -> Any:
        """See `Tables.outputs`."""

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        """See `Tables.read`."""

    def stored(self, name: str, columns: str, where: str) -> list[Row]:
        """See `Tables.stored`."""

    def has(self, name: str) -> bool:
        """See `Tables.has`."""

    def put(self, name: str, rows: Any, key: Sequence[str]) -> None:
        """See `Tables.put`."""

    def close(self) -> None:
        """Release connections."""


class ByJoin(ABC):
    """The part of `Tables` that works by a `Join` in DuckDB, wherever source and outputs are."""

    _checked: Join | None = None
    _read: Join | None = None
    """The join of the latest `rows`."""

    def check(self, selection: Selection) -> None:
        self._checked = self._joined(selection)
        self._checked.check()

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        self._read = self._joined(selection)
        yield from self._read.rows(size)

    def count(self, selection: Selection) -> tuple[int, int]:
        return self._joined(selection).count()

    def unreadable(self) -> Unreadable:
        return Unreadable() if self._read is None else self._read.unreadable

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        return self.writer_of(self._key_to_write(selection), selection.key, table, selection.shard)

    def check_outputs(self, selection: Selection, table: OutputTable) -> None:
        self.check_outputs_of(self._key_to_write(selection), selection.key, table)

    def _key_to_write(self, selection: Selection) -> pa.Schema:
        checked = self._checked
        if checked is None or checked.selection is not selection:
            checked = self._joined(selection)
        return checked.key_to_write

    @abstractmethod
    def writer_of(
        self, types: pa.Schema, key: Sequence[str], table: OutputTable, shard: Shard | None
    ) -> Writer:
        """See `Home.writer_of`."""

    @abstractmethod
    def check_outputs_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> None:
        """See `Home.check_outputs_of`."""

    @abstractmethod
    def _joined(self, selection: Selection) -> Join: ...


class Elsewhere(ByJoin):
    """`Tables` with rows from `source` and outputs at `home`; closing it closes both."""

    def __init__(self, source: Source, home: Home, display: str) -> None:
        """`display`: where the rows are read, as text for people."""
        self._display = display
        self._source = source
        self._home = home

    def writer_of(
        self, types: pa.Schema, key: Sequence[str], table: OutputTable, shard: Shard | None
    ) -> Writer:
        return self._home.writer_of(types, key, table, shard)

    def check_outputs_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> None:
        self._home.check_outputs_of(types, key, table)

    def outputs(self, name: str) -> Any:
        return self._home.outputs(name)

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        """See `Tables.read`; reads from `home`."""
        return self._home.read(select, columns)

    def stored(self, name: str, columns: str, where: str) -> list[Row]:
        return self._home.stored(name, columns, where)

    def has(self, name: str) -> bool:
        return self._home.has(name)

    def put(self, name: str, rows: Any, key: Sequence[str]) -> None:
        self._home.put(name, rows, key)

    def where(self, name: str) -> str:
        return self._home.where(name)

    def read_from(self, name: str) -> str:
        return self._display

    def close(self) -> None:
        self._source.close()
        self._home.close()

    def _joined(self, selection: Selection) -> Join:
        return Join(self._source, self._home, selection, self._home.workspace)
