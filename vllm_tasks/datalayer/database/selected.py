"""The rows of a source that a selection chooses, by a join with the outputs in the same database."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.database.copied import copy_of, pages_of
from vllm_tasks.datalayer.database.keyed_table import UtcTime
from vllm_tasks.datalayer.database.relation import Relation
from vllm_tasks.datalayer.selection import POSITION, Selection
from vllm_tasks.datalayer.spool import spools
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.errors import InvalidCall

ID_TYPES: dict[str, type] = {
    **dict.fromkeys(("INT", "smallint", "integer", "bigint"), int),
    **dict.fromkeys(("TEXT", "text", "character varying", "bpchar"), str),
}
"""Python type of an id by the type of its column; ids of other columns are parsed by the database."""
BOOLEANS = ("boolean", "BOOLEAN", "BOOL", "NUM")
"""SQLite reports types that it does not know, including BOOLEAN, as `NUM`."""


@dataclass(frozen=True)
class Joined:
    """The source (with the ids), joined with its outputs."""

    query: sa.Select[Any]
    condition: sa.ColumnElement[bool]
    """Selects rows."""
    redo: sa.ColumnElement[Any]
    input_hash: sa.ColumnElement[Any]

    def selected(self, source: Relation, names: Sequence[str]) -> sa.Select[Any]:
        """A query of the selected rows: these columns, `redo`, `input_hash`."""
        wanted = [source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)]
        extra = (self.redo.label("redo"), self.input_hash.label("input_hash"))
        return self.query.add_columns(*wanted, *extra).where(self.condition)


@dataclass(frozen=True)
class SelectedRows:
    """The rows of `source` that `selection` chooses."""

    backend: Backend
    source: Relation
    selection: Selection

    def pages(self, size: int) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`, of at most `size` rows."""
        return self._spooled(size) if self.backend.server_side else self._copied(size)

    def refuse_bad_ids(self, connection: Connection, kinds: Sequence[Any]) -> None:
        """Raise `InvalidCall` for an id that is not a value of the key, whose types are `kinds`."""
        specs = [kind.compile(connection.dialect).partition(" COLLATE ")[0] for kind in kinds]
        for key in self.selection.ids or ():
            if len(key) != len(kinds) or not all(map(_fits, key, specs)):
                types = ", ".join(
                    f"{name} ({spec})" for name, spec in zip(self.selection.key, specs, strict=True)
                )
                raise InvalidCall(f"ids: {key!r:.200} is not a value of the key {types}")

    def joined(
        self,
        connection: Connection,
        after: tuple[Sequence[str], Sequence[Any], Sequence[Any]] | None = None,
    ) -> Joined:
        """The source, joined with its outputs.

        `after` has columns, their types, and the values of the row after which to begin.
        """
        source, selection = self.source, self.selection
        table = self.backend.located(connection, selection.outputs)
        shape = self.backend.shape(connection, table)
        query = self._chosen(connection)
        if after:
            names, *place = after
            query = query.where(self.backend.after([source.rows.c[name] for name in names], *place))
        if not shape:
            none = selection.refresh == "failed"
            return Joined(query, sa.false() if none else sa.true(), sa.literal(0), sa.null())
        done = table.clause(shape).alias("o")
        # The outputs' column is on the left: SQLite compares by the collation of the left one.
        on = [done.c[name] == source.rows.c[name] for name in selection.key]
        if POSITION in shape:
            on.append(sa.func.coalesce(done.c[POSITION], 0) == 0)
        if after:  # the server does not infer this condition, and would scan all earlier outputs
            on.append(self.backend.after([done.c[name] for name in names], *place))
        return Joined(
            query.select_from(source.rows.outerjoin(done, sa.and_(*on))),
            _condition(done, selection),
            sa.case((done.c[selection.key[0]].is_not(None), 1), else_=0),
            sa.case((done.c["_fingerprint"] == selection.fingerprint, done.c["_input_hash"])),
        )

    def _chosen(self, connection: Connection) -> sa.Select[Any]:
        """The rows of the source that `ids` and `shard` select."""
        source, selection = self.source, self.selection
        query = source.query()
        columns = [source.rows.c[name] for name in selection.key]
        if selection.ids is not None:
            kinds = source.kinds(connection, selection.key)
            self.refuse_bad_ids(connection, kinds)
            ids = self.backend.listed(connection, kinds, list(dict.fromkeys(selection.ids)))
            query = query.where((columns[0] if len(columns) == 1 else sa.tuple_(*columns)).in_(ids))
        if selection.shard is not None:
            index, count = selection.shard
            query = query.where(self.backend.hashed(columns) % count == index)
        return query

    def _spooled(self, size: int) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`, in the order of the key, by way of a spool file."""
        source, selection = self.source, self.selection
        names = (*selection.key, *selection.columns)
        with self.backend.reading() as connection:
            order = source.index(connection, selection.key) or selection.key
            kinds = source.kinds(connection, order)
        columns = [source.rows.c[name] for name in order]
        place = self.backend.bound(columns)

        def query(connection: Connection, after: Sequence[Any] | None) -> sa.Select[Any]:
            behind = None if after is None else (order, kinds, after)
            joined = self.joined(connection, behind)
            bound = [c.label(f"_after{i}") for i, c in enumerate(place)]
            return joined.selected(source, names).add_columns(*bound).order_by(*columns)

        for spool in spools(self.backend, query, len(order), size):
            yield from spool.pages()

    def _copied(self, size: int) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`, by way of a copy of the keys or the rows."""
        source, selection = self.source, self.selection
        names = (*selection.key, *selection.columns)
        with self.backend.reading() as connection:
            source.kinds(connection, selection.key)  # refuses bad key types: `check` may not have run
            joined = self.joined(connection)
            indexed = source.index(connection, selection.key)
            copied = selection.key if indexed else names
            types = [*self.backend.types(connection, source.rows, copied), sa.Integer(), sa.Text()]
            copy = copy_of(connection, joined.selected(source, copied), types)
            page = sa.select(*list(copy.c)[1:])
            if indexed:
                on = [source.rows.c[name] == copy.c[i + 1] for i, name in enumerate(selection.key)]
                wanted = [source.rows.c[name].label(f"v{i}") for i, name in enumerate(names)]
                page = sa.select(*wanted, *list(copy.c)[-2:])
                page = page.select_from(copy.join(source.rows, sa.and_(*on)))
            yield from pages_of(connection, copy, page, size)


def _condition(done: sa.FromClause, selection: Selection) -> sa.ColumnElement[bool]:
    """The condition on a source row, joined with its output, that selects it."""
    other = done.c["_fingerprint"].is_distinct_from(selection.fingerprint)
    condition: sa.ColumnElement[bool] = sa.true()
    if selection.refresh == "missing":
        condition = other
    elif selection.refresh == "failed":
        condition = done.c["_error"].is_not(None)
    if selection.since and selection.refresh in ("failed", "all"):
        created = sa.type_coerce(done.c["_created_at"], UtcTime())
        condition = sa.and_(condition, sa.or_(other, created < selection.since))
    return condition


def _fits(value: Any, spec: str) -> bool:
    """Whether a value may be an id of a column of this type."""
    if isinstance(value, bool):
        return spec in BOOLEANS
    if isinstance(value, str) and not is_text(value):
        return False
    return value is not None and isinstance(value, ID_TYPES.get(spec, object))
