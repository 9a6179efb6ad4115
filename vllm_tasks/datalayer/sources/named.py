"""The columns of a table that a SELECT gets: only those that it names, so that others cannot cost rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa

from vllm_tasks.datalayer.sources import Source, Unreadable
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.errors import InvalidCall

NOTHING = pa.schema([])


def named_columns(source: Source, named: Collection[str] | None, table: str) -> list[str]:
    """The columns with these names, whatever their case (None: all); at least one if there is any. Raises
    `InvalidCall` for two columns that are the same in SQL."""
    # SQL is UTF-8: it cannot name a column with a lone surrogate.
    every = [name for name in source.columns() if is_text(name)]
    wanted = {name.casefold() for name in (every if named is None else named)}
    found: dict[str, str] = {}
    for name in every:
        if (folded := name.casefold()) not in wanted:
            continue
        if folded in found:
            raise InvalidCall(
                f"{table!r} has the columns {found[folded]!r:.100} and {name!r:.100}, which are one in SQL; "
                "name the table itself instead of a SELECT, or rename one of them"
            )
        found[folded] = name
    return list(found.values()) or every[:1]


class NoColumns:
    """`Streamed` for a source without rows and columns: it has every column that a SELECT names, empty."""

    def __init__(self, source: Source, named: Collection[str] | None, table: str) -> None:
        """Raises `InvalidCall` if no column is named."""
        self.source = source
        self.left_out = Unreadable()
        if not named:
            self._count(self.left_out)
            why = f" ({self.left_out.examples[0]})" if self.left_out.count else ": it is empty"
            raise InvalidCall(f"{table!r} has no columns{why}; name columns in the SELECT instead of *")
        self.columns = list({name.casefold(): name for name in named}.values())

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """See `Streamed`."""
        return pa.schema([(name, pa.string()) for name in columns])

    def batches(self, schema: pa.Schema, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        """No batches; unreadable lines are counted."""
        self._count(unreadable)
        yield from ()

    def _count(self, unreadable: Unreadable) -> None:
        for _ in self.source.parts(NOTHING, (), unreadable):
            pass
