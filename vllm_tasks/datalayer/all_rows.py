"""Reads all rows of a source; a missing column, or a row that cannot be read, is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from vllm_tasks.datalayer.selection import Row
from vllm_tasks.datalayer.sources import Source, Unreadable
from vllm_tasks.errors import InvalidCall, near


def read(source: Source, select: str, columns: Sequence[str] | None, size: int) -> Iterator[list[Row]]:
    """All rows of a source as mappings of column to value, in lists of at most `size`.

    Raises `InvalidCall` for missing columns, and at the end for rows that could not be read.
    """
    there = source.columns()
    names = list(dict.fromkeys(there if columns is None or not there else columns))
    refuse_missing(select, names, there)
    unreadable = Unreadable()
    for part in source.parts(pa.schema([]), names, unreadable):
        for number, why in part.errors.items():
            unreadable.add(f"row {number}", why)
        good = [i for i in range(part.count) if i not in part.errors]
        for values in part.values(good):
            rows: list[Row] = [dict(zip(names, row, strict=True)) for row in values if row is not None]
            for start in range(0, len(rows), size):
                yield rows[start : start + size]
    refuse_unreadable(select, unreadable)


def refuse_unreadable(select: str, unreadable: Unreadable) -> None:
    """Raise `InvalidCall` if rows could not be read where all are needed."""
    if unreadable.count:
        raise InvalidCall(
            f"{unreadable.count:,} rows of {select!r} cannot be read: {'; '.join(unreadable.examples[:3])}; "
            "correct them, or remove them from the file"
        )


def refuse_missing(select: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raise `InvalidCall` for a wanted column that is missing or occurs twice."""
    if missing := [name for name in dict.fromkeys(wanted) if name not in there]:
        hints = "".join(near(name, there) for name in missing[:3])
        raise InvalidCall(
            f"{select!r} has no column {', '.join(map(repr, missing))}{hints}; "
            f"it has {', '.join(map(repr, there[:50]))}{_separated(select, there)}"
        )
    if twice := [name for name in wanted if there.count(name) > 1]:
        raise InvalidCall(f"{select!r} has two columns {twice[0]!r}; rename one with AS")


def _separated(select: str, there: Sequence[str]) -> str:
    """A hint for a file that has a single column because its cells are separated by another character."""
    if len(there) != 1 or not (found := [d for d in ";\t|" if d in there[0]]):
        return ""
    excel = there[0].startswith("sep=")  # a first line that only Excel understands
    return (
        f"; if {found[0]!r} separates its cells, {'remove its first line and ' * excel}give it as an option: "
        f'Datalayer(..., read={{{select!r:.100}: {{"delimiter": {found[0]!r}}}}})'
    )
