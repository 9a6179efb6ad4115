"""What a source is: columns, keys, and rows in parts, whatever format or store they come from.

A row depends on itself alone: its key and its values never change with what else the source has, with its
length or with the columns that are selected. What cannot be read costs its own row and no other: an error
row where the key is known, else a line of the report (`Unreadable`).

A source is read in parts. The keys of a part come first and are matched with the outputs; only then, and
only of the rows that are wanted, values are read, in lists bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

PART_BYTES = 16 << 20
"""About how many bytes of values a part may hold in memory at once, and how many `Part.values` yields in a
list at most; a single row may be larger."""
PART_ROWS = 1 << 20
"""Rows of a part at most, whose keys are in memory."""
EXAMPLES = 20
"""Unreadable lines that are kept for people."""
SHOWN_ERROR = 200
"""Characters of why a line could not be read."""

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """Some rows of a source: their keys, and the way to their values."""

    keys: pa.Table
    """The key's columns in the types that were asked for, never NULL; a row each, in any order."""
    values: Callable[[Sequence[int]], Iterator[Sequence[Values | None]]]
    """Of the rows with these numbers (ascending, from 0): the wanted columns' values as `values.python` has
    them, in lists of at most `PART_BYTES` or one row; None for a row that is gone since its key was read.
    Called at most once."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Why rows of these numbers could not be read, though their keys could; they have no values."""
    rows: int | None = None
    """How many there are, where the key has no columns: a whole table is read without one."""

    @property
    def count(self) -> int:
        """How many rows the part has."""
        return int(self.keys.num_rows) if self.rows is None else self.rows


@dataclass
class Unreadable:
    """Rows without a readable key: counted, and told by their place."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """`where`: the file and the line, from 1; `why` without the row's content at any length."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {why[:SHOWN_ERROR]}")

    def take(self, others: Unreadable) -> None:
        """Count those of another source, too."""
        self.count += others.count
        self.examples += others.examples[: EXAMPLES - len(self.examples)]


class Source(Protocol):
    """Rows to read, as often as needed and each time the same ones, unless somebody changes them meanwhile.

    Errors are `InvalidCall` for what stays wrong and `TablesUnavailable` for what may pass.
    """

    def columns(self) -> Sequence[str]:
        """All columns in their order; of lines of JSON every field that any line has. Empty when the source
        has neither rows nor a schema."""

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        """What the columns `key`, which are there, are stored as (see `keys.key_type`); raises `InvalidCall`
        for a type that identifies no row."""

    def identified_by(self, key: Sequence[str]) -> bool:
        """Whether the source itself promises (by a unique index, say) that no two rows have the same key and
        none has NULL in it; else that is found out by reading all keys."""

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        """The key of every row, in these types: NULLs among them, but in files of text, where a row without a
        key costs itself."""

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        """All rows, each in one part; with an empty `key` without keys.

        Rows whose key is NULL or does not fit its type go to `unreadable`.

        Closing the iterator ends the reading. Columns may repeat those of the key.
        """

    def close(self) -> None:
        """Release files, connections and temporary copies."""
