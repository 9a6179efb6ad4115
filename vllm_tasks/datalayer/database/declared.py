"""Python values of SQLite's values by the declared types of their columns."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer import vectors
from vllm_tasks.datalayer.database.backends import TableName
from vllm_tasks.datalayer.values import from_json

FINE = re.compile(r"[.,]\d{7}")
"""A fraction of a second that `fromisoformat` would cut after microseconds."""


def _moment(text: str) -> dt.datetime:
    if FINE.search(text):
        raise ValueError(f"{text!r:.100} has more than microseconds")
    return dt.datetime.fromisoformat(text)


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _json(text: str) -> Any:
    if "NaN" in text or "Infinity" in text:  # Python's extensions, which are not JSON
        json.loads(text, parse_constant=_no_number)
    return from_json(text)


READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("DATETIME", "TIMESTAMP"), _moment),
    "DATE": dt.date.fromisoformat,
    **dict.fromkeys(("JSON", "JSONB"), _json),
}
"""Parsers of SQLite's text by the declared type of the column."""


def declared(connection: Connection, table: TableName | None, names: Sequence[str]) -> list[str]:
    """The declared types of a table's or view's columns, without lengths; empty if there are none."""
    if table is None or connection.dialect.name != "sqlite":
        return [""] * len(names)
    query = sa.text("SELECT name, type FROM pragma_table_xinfo(:name, :schema)")
    found = connection.execute(query, {"name": table.name, "schema": table.schema or "main"}).all()
    kinds = {column: kind.partition("(")[0].strip().upper() for column, kind in found}
    return [kinds.get(name, "") for name in names]


def typed(value: Any, kind: str) -> Any:
    """A value in its column's declared type; SQLite allows other values, which are returned unchanged."""
    if kind in ("BOOLEAN", "BOOL") and value in (0, 1):
        return bool(value)
    if kind == vectors.BLOB and isinstance(value, bytes) and len(value) % 4 == 0:
        return vectors.of_bytes(value)
    if kind in READ and isinstance(value, str):
        try:
            return READ[kind](value)
        except (ValueError, RecursionError):
            return value
    return value
