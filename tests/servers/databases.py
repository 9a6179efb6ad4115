"""Databases for tests: an empty SQLite file or PostgreSQL database, and rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests.servers.postgres import Postgres
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn, OutputTable, Selection, SourceRow

OUT = "_outputs__m"
TABLE = OutputTable(OUT, (OutputColumn("output", "str"),))
FLAT = replace(TABLE, flatten=True)
NOW = dt.datetime(2026, 11, 22, 12, 0, 0, 1, tzinfo=dt.UTC)


def selection(select: str = "t", **changed: Any) -> Selection:
    given: dict[str, Any] = {"key": ("id",), "columns": ("text",), "outputs": OUT, "fingerprint": "f"}
    return Selection(select, **(given | changed))


def row(*key: Any, names: Sequence[str] = ("id",), **changed: Any) -> dict[str, Any]:
    own = dict.fromkeys(OWN_COLUMNS) | {"_fingerprint": "f", "_input_hash": "h", "_created_at": NOW}
    return dict(zip(names, key, strict=True)) | {"output": "o"} | own | changed


def every(db: Database, chosen: Selection, size: int = 3) -> list[SourceRow]:
    pages = list(db.rows(chosen, size))
    assert all(0 < len(page) <= size for page in pages)
    return sorted((r for page in pages for r in page), key=lambda r: repr(r.key))


def keys(db: Database, chosen: Selection) -> list[Any]:
    found = [r.key[0] if len(r.key) == 1 else r.key for r in every(db, chosen)]
    assert db.count(chosen)[1] == len(found)
    return found


@dataclass
class Place:
    """An empty database, a connection of the test's own to it, and the `Database`s that it opened."""

    url: str
    opened: list[Database] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = sa.create_engine(
            self.url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool
        )

    @property
    def sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def open(self) -> Database:
        self.opened.append(Database(self.url))
        return self.opened[-1]

    def sql(self, *statements: str) -> list[Any]:
        """Run statements; returns the rows of the last one."""
        with self.engine.begin() as connection:
            for statement in statements:
                if not self.sqlite:
                    statement = statement.replace("%", "%%")  # psycopg's own
                result = connection.exec_driver_sql(statement)
            return [tuple(r) for r in result.all()] if result.returns_rows else []

    def fill(self, count: int = 10) -> Database:
        """The table `t` with the ids 0, 1, ..."""
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1}) "
        insert = "INSERT INTO t " + numbers + "SELECT i, 'text ' || i FROM n"
        self.sql("CREATE TABLE t (id BIGINT NOT NULL PRIMARY KEY, text TEXT)", insert)
        return self.open()

    def outputs(self, column: str = "output") -> list[tuple[Any, Any]]:
        return sorted(self.sql(f'SELECT id, {column} FROM "{OUT}"'))


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    """One for all tests here: each takes a while to make and to remove."""
    return postgres.new_database()


@pytest.fixture
def pg(database: str) -> Iterator[Place]:
    """An empty PostgreSQL database."""
    made = Place(database)
    made.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", "GRANT USAGE ON SCHEMA public TO public")
    yield made
    for db in made.opened:
        db.close()


def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty SQLite file or PostgreSQL database, by the fixture's parameter."""
    if request.param == "postgres":
        yield request.getfixturevalue("pg")
        return
    made = sqlite(tmp_path)
    yield made
    for db in made.opened:
        db.close()


def sqlite(folder: Path) -> Place:
    (folder / "t.db").touch()
    return Place(f"sqlite:///{folder}/t.db")
