"""The table, view or SELECT that a `select` names in a database, with its columns and its key."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer.database.backends import Backend, TableName
from vllm_tasks.datalayer.sql_tokens import tokens
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.errors import InvalidCall, near

logger = logging.getLogger(__name__)

# The first loop is possessive: without backtracking, the time is linear in the length of the text.
STATEMENT = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*+(?:select|with)\b", re.IGNORECASE | re.DOTALL)
NO_KEYS = ("json", "jsonb", "xml", "hstore", "point", "interval", "xid", "cid", "vector")
"""Types whose values are not hashable, have no equality or no order, or may be equal but different."""


@dataclass(frozen=True)
class Relation:
    """The rows that `select` names."""

    backend: Backend
    rows: sa.FromClause
    columns: tuple[str, ...]
    table: TableName | None
    """Its name, if it is a table or view."""

    @classmethod
    def of(
        cls, backend: Backend, connection: Connection, select: str, wanted: Sequence[str] | None
    ) -> Relation:
        """The relation; raises `InvalidCall` unless it has each of the `wanted` columns (None: all) once."""
        select = select.strip()
        if not is_text(select):
            raise InvalidCall(f"select={select[:200]!r} has half a character (a lone surrogate)")
        table = named_table(connection, select)
        if table:
            clause: sa.TableClause | sa.TextClause = table.clause()
        elif STATEMENT.match(select):
            if connection.dialect.name == "postgresql" and "$" in select and "$" in tokens(select):
                # It would be filled with a value of ours.
                raise InvalidCall(f"{select[:200]!r} has a parameter, such as $1: write its value instead")
            # Every colon is escaped: SQLAlchemy takes a colon and a name for a parameter.
            clause = sa.text(select.rstrip("; \t\r\n").replace(":", "\\:") + "\n")
        else:
            inspector = sa.inspect(connection)
            there = [*inspector.get_table_names(), *inspector.get_view_names()]
            raise InvalidCall(
                f"select={select[:200]!r} is neither a table or view of {backend.where()} nor a SELECT"
                f"{_near(select, there)}"
            )
        columns = tuple(_columns(backend, connection, clause))
        wanted = columns if wanted is None else wanted
        twice = sorted({c for c in columns if columns.count(c) > 1} & {*wanted})
        if twice:
            raise InvalidCall(f"the select has more than one column {twice[0]!r}; name it in the SELECT")
        if connection.dialect.name == "sqlite":
            _refuse_cases(columns)
        for name in wanted:
            if name not in columns:
                raise InvalidCall(f"{select[:200]!r} has no column {name!r}{_near(name, columns)}")
        return cls(backend, _rows(clause, columns), columns, table)

    def query(self, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        """These columns of all rows."""
        # Dangerous to simplify: a parameter selects the protocol in which PostgreSQL refuses two statements
        # in one text, so that a `select` that breaks out of the subquery does not run at all.
        return sa.select(*columns).select_from(self.rows).where(sa.literal(1) == 1)

    def kinds(self, connection: Connection, key: Sequence[str]) -> list[Any]:
        """The types of the key's columns; raises `InvalidCall` for one that identifies no row."""
        kinds = self.backend.types(connection, self.rows, key)
        for name, kind, spec in zip(key, kinds, self.backend.plain(connection, kinds), strict=True):
            if self.backend.is_floating(kind) or spec in ("real", "double precision"):
                raise InvalidCall(
                    f"the key {name!r} is a floating-point number, which does not identify a row: equal "
                    "numbers may be stored unequal; select it as text or a whole number"
                )
            if spec.endswith(("]", "multirange")) or spec in NO_KEYS:
                raise InvalidCall(f"the key {name!r} is of the type {spec}, which does not identify a row")
        return kinds

    def index(self, connection: Connection, key: Sequence[str]) -> tuple[str, ...] | None:
        """Columns of the key that are unique by an index, in the index's order."""
        if self.table is None:
            return None
        found = self.backend.unique(connection, self.table)
        return next((columns for columns in found if {*columns} <= {*key}), None)

    def refuse_bad_keys(self, connection: Connection, key: Sequence[str]) -> None:
        """Raise `InvalidCall` for keys that are NULL or not unique, with their count and an example."""
        columns = [self.rows.c[name].label(f"_key{i}") for i, name in enumerate(key)]
        if not self.index(connection, key):
            logger.info("checking that keys are unique, since %s has no unique index", ", ".join(key))
            groups = self.query(*columns, sa.func.count().label("_rows"))
            groups = groups.group_by(*(c.element for c in columns))
            groups = groups.where(*(c.element.is_not(None) for c in columns))
            twice = groups.having(sa.func.count() > 1).subquery("twice")
            rows = sa.func.sum(twice.c._rows)
            some = sa.select(*twice.c, sa.func.count().over(), rows.over()).limit(1)
            if row := connection.execute(some).first():
                raise InvalidCall(
                    f"the key {', '.join(key)} is not unique: {row[-2]} keys occur in {row[-1]} rows, for "
                    f"example {_display(key, row)} in {row[-3]}; give a primary_id that identifies a row"
                )
        null = sa.or_(*(c.element.is_(None) for c in columns))
        if empty := connection.execute(self.query(sa.func.count()).where(null)).scalar():
            row = connection.execute(self.query(*columns).where(null).limit(1)).first()
            raise InvalidCall(
                f"the key {', '.join(key)} is NULL in {empty} rows"
                + (f", for example {_display(key, row)}" if row is not None and len(key) > 1 else "")
                + "; leave them out with a WHERE, or give another primary_id"
            )


def named_table(connection: Connection, name: str) -> TableName | None:
    """The table or view that a text names, with or without its schema."""
    inspector = sa.inspect(connection)
    schema, dot, rest = name.partition(".")
    if len(name) > 200 or "\0" in name or not name:
        return None
    if inspector.has_table(name):
        return TableName(name)
    return TableName(rest, schema) if dot and inspector.has_table(rest, schema) else None


def _columns(
    backend: Backend, connection: Connection, clause: sa.TableClause | sa.TextClause
) -> Sequence[str]:
    rows = _rows(clause, ())
    query = sa.select(sa.text("*")).select_from(rows).where(sa.literal(1) == 1).limit(0)
    try:
        names = list(connection.execute(query).keys())
    except DBAPIError as e:
        error = backend.translated(e)
        if isinstance(error, InvalidCall) and isinstance(clause, sa.TextClause):
            raise InvalidCall(f"select must be exactly one SELECT statement that runs: {error}") from e
        raise error from e
    if isinstance(clause, sa.TextClause) and (numbered := backend.numbered):
        there = {name.lower() for name in names}
        return [
            match[1] if (match := numbered.fullmatch(n)) and match[1].lower() in there else n for n in names
        ]
    return names


def _rows(clause: sa.TableClause | sa.TextClause, columns: Sequence[str]) -> sa.FromClause:
    if isinstance(clause, sa.TextClause):
        return clause.columns(*map(sa.column, columns)).subquery("s")
    return sa.table(clause.name, *map(sa.column, columns), schema=clause.schema).alias("s")


def _refuse_cases(columns: Sequence[str]) -> None:
    """Refuse names that differ only in case: SQLite takes them for one column and returns the first."""
    found: dict[bytes, str] = {}
    for name in columns:
        folded = name.encode(errors="surrogatepass").lower()  # as SQLite does, for ASCII only
        other = found.setdefault(folded, name)
        if other != name:
            raise InvalidCall(
                f"the select has the columns {other!r:.100} and {name!r:.100}, which are one in "
                "SQLite; name one otherwise with AS"
            )


def _near(name: str, names: Sequence[str]) -> str:
    there = ", ".join(map(repr, list(names)[:20])) + (", ..." if len(names) > 20 else "")
    return f"{near(name, names)}; there is {there or 'nothing'}"


def _display(key: Sequence[str], row: Sequence[Any]) -> str:
    return ", ".join(f"{name}={value!r:.100}" for name, value in zip(key, row, strict=False))
