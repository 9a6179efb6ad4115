"""A temporary copy of a query's rows, which is read in pages and holds no lock between two of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def copy_of(connection: Connection, query: sa.Select[Any], kinds: Sequence[Any]) -> sa.Table:
    """A temporary copy, with `n` from 1 and the query's columns."""
    copy = sa.Table(
        "_vllm_tasks_selected",
        sa.MetaData(),
        sa.Column("n", sa.Integer, primary_key=True),
        *(sa.Column(f"c{i}", kind) for i, kind in enumerate(kinds)),
        prefixes=["TEMPORARY"],
    )
    copy.create(connection, checkfirst=False)
    filled = copy.insert().from_select([c.name for c in copy.c][1:], query, include_defaults=False)
    connection.execute(filled)
    return copy


def pages_of(
    connection: Connection, copy: sa.Table, query: sa.Select[Any], size: int
) -> Generator[Sequence[Any], None, None]:
    """Pages of a query that joins each row of a copy with one row."""
    total = connection.execute(sa.select(sa.func.max(copy.c.n))).scalar() or 0
    page = query.where(copy.c.n > sa.bindparam("after"), copy.c.n <= sa.bindparam("last"))
    for after in range(0, total, size):
        yield connection.execute(page, {"after": after, "last": after + size}).all()
