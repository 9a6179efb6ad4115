"""Sources: columns, keys, and rows in parts, from any format or store.

Each row stands alone: its key and values never depend on other rows, on the length of the source or on the
selected columns. Something unreadable costs its own row and no other: it becomes an error row if the key is
known, otherwise a line of the report (`Unreadable`).

A source is read in parts. The keys of a part are read first and joined with the outputs; then the values of
the selected rows alone are read, in lists bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 16 << 20
"""Approximate maximum bytes of values that a part holds in memory, and that `Part.values` yields in a list; a
single row may be larger."""
PART_ROWS = 1 << 20
"""Maximum rows of a part, whose keys are in memory."""
EXAMPLES = 20
"""Unreadable lines that are kept for the report."""
ERROR_LENGTH = 200
"""Characters of the reason why a line could not be read."""

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """Some rows of a source: their keys, and access to their values.

    `keys` has the key's columns in the requested types, never NULL, with one row for each row of the part, in
    any order. `values` returns the values of the rows with the given numbers (ascending, from 0) in the
    requested columns, as `values.python` returns them, in lists of at most `PART_BYTES` or one row; None for
    a row that was removed since its key was read. It is called at most once. `errors` says by row number why
    rows with a known key could not be read; they have no values. `rows` is the number of rows if the key has
    no columns, as when a complete table is read.
    """

    keys: pa.Table
    values: Callable[[Sequence[int]], Iterator[Sequence[Values | None]]]
    errors: Mapping[int, str] = field(default_factory=dict)
    rows: int | None = None

    @property
    def count(self) -> int:
        """The number of rows in the part."""
        return int(self.keys.num_rows) if self.rows is None else self.rows


@dataclass
class Unreadable:
    """Rows without a readable key: their number, and the places of some of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Count a row.

        Args:
            where: The file and the line, from 1.
            why: The reason, with little of the row's content.
        """
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why[:ERROR_LENGTH]}")

    def take(self, others: Unreadable) -> None:
        """Add the rows of another source.

        Args:
            others: The rows to add.
        """
        self.count += others.count
        self.examples += others.examples[: EXAMPLES - len(self.examples)]


class Source(Protocol):
    """Rows that can be read repeatedly, each time the same ones unless someone changes them meanwhile.

    Errors are `InvalidCall` if they are permanent and `TablesUnavailable` if they are temporary.
    """

    def columns(self) -> Sequence[str]:
        """All columns in their order; for JSON lines, every field that any line has.

        Returns:
            The names, empty if the source has neither rows nor a schema.
        """

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        """The types in which outputs store the key, see `keys.key_type`.

        Args:
            key: Existing columns.

        Returns:
            One type for each column.

        Raises:
            InvalidCall: A type cannot identify a row.
        """

    def identified_by(self, key: Sequence[str]) -> bool:
        """Whether the source itself guarantees (for example by a unique index) that a key is unique.

        Args:
            key: Existing columns.

        Returns:
            True if no two rows have the same key and none has NULL in it; False if all keys must be read to
            find out.
        """

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        """Stream the key of every row.

        Args:
            key: The key's columns and their types.

        Returns:
            The keys, NULLs included; files of text omit rows without a key, which are unreadable.
        """

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        """Stream all rows, each in one part. Closing the iterator ends the reading.

        Args:
            key: The key's columns and their types; if empty, parts have no keys.
            columns: The columns to read; may repeat those of the key.
            unreadable: Receives the rows whose key is NULL or does not fit its type.

        Returns:
            The parts.
        """

    def close(self) -> None:
        """Release files, connections and temporary copies."""
