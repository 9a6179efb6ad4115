"""Databases as sources: SQLite, PostgreSQL and MariaDB, read in parts for outputs elsewhere."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa

from tests.servers import mariadb
from tests.servers.databases import Place
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.sql import SqlSource
from vllm_tasks.errors import InvalidCall


@pytest.fixture(scope="module")
def maria() -> Iterator[str]:
    """One MariaDB for all tests here."""
    if mariadb.binary() is None:
        pytest.skip("needs MariaDB: apt-get install mariadb-server")
    pytest.importorskip("pymysql")
    with mariadb.running() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "postgres":
        yield request.getfixturevalue("pg").url
    elif request.param == "sqlite":
        (tmp_path / "t.db").touch()
        yield f"sqlite:///{tmp_path}/t.db"
    else:
        found = request.getfixturevalue("maria")
        run(found, "DROP DATABASE tests", "CREATE DATABASE tests")
        yield found


def run(url: str, *statements: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def rows(source: SqlSource, key: tuple[str, ...], columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Key and values of all rows; every second row is requested by its number, and both halves are joined."""
    schema = pa.schema(list(zip(key, source.key_types(key), strict=True)))
    unreadable, found = Unreadable(), []
    for part in source.parts(schema, columns, unreadable):
        wanted = [i for i in range(part.count) if i % 2 == 0]
        values = [row for page in part.values(wanted) for row in page]
        keys = part.keys.take(pa.array(wanted, pa.int64())).to_pylist()
        found += [(*k.values(), *v) for k, v in zip(keys, values, strict=True)]
    assert not unreadable.count
    return found


def test_rows_are_read_in_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, views and SELECTs, by an index or without; each row once, its values beside its key."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.LEAST", 200)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.LIMIT", 3)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.FIRST", 2)
    run(
        url,
        "CREATE TABLE t (a VARCHAR(20) NOT NULL, b INTEGER NOT NULL, text TEXT, PRIMARY KEY (b, a))",
        *(f"INSERT INTO t VALUES ('k{i % 7}', {i}, 'text {i}')" for i in range(40)),
        "CREATE VIEW v AS SELECT * FROM t",
    )
    expected = {(f"k{i % 7}", i, f"text {i}") for i in range(40)}
    for select in ("t", "v", "SELECT * FROM t -- :x %"):
        source = SqlSource(url, select)
        assert list(source.columns()) == ["a", "b", "text"]
        assert source.identified_by(("a", "b"))
        found = rows(source, ("a", "b"), ("text",))
        assert {(a, int(b), text) for a, b, text in found} <= expected
        assert len({row[:2] for row in found}) == len(found) >= 20
        key = pa.schema([("b", source.key_types(("b",))[0])])
        assert sorted(int(k) for t in source.keys(key) for k in t["b"].to_pylist()) == list(range(40))
        for whole in source.parts(pa.schema([]), ("text",), Unreadable()):
            assert whole.count == 40
            assert len({v for page in whole.values([3, 5]) for v in page}) == 2
        source.close()


def test_a_key_that_does_not_fit_its_type_is_unreadable_and_not_counted(tmp_path: Path) -> None:
    """SQLite has texts in columns of numbers; counted among the keys, the row would seem up to date."""
    url = f"sqlite:///{tmp_path}/x.db"
    run(url, "CREATE TABLE t (id INT, text TEXT)", "INSERT INTO t VALUES (1, 'a'), ('total', 'b'), (3, 'c')")
    source = SqlSource(url, "t")
    key = pa.schema([("id", pa.int64())])
    assert [k for table in source.keys(key) for k in table["id"].to_pylist()] == [1, 3]
    unreadable = Unreadable()
    assert sum(part.count for part in source.parts(key, ("text",), unreadable)) == 2
    assert unreadable.count == 1
    source.close()


def test_bad_keys_are_refused(url: str) -> None:
    """NULL and doubled keys, columns and tables that are not there."""
    run(url, "CREATE TABLE t (id INTEGER, text TEXT)", "INSERT INTO t VALUES (1, 'a'), (1, 'b'), (NULL, 'c')")
    source = SqlSource(url, "t")
    with pytest.raises(InvalidCall, match="not unique"):
        source.identified_by(("id",))
    some = SqlSource(url, "SELECT * FROM t WHERE text <> 'b'")
    with closing(some), pytest.raises(InvalidCall, match="NULL in 1 rows"):
        some.identified_by(("id",))
    unreadable = Unreadable()
    (part,) = source.parts(pa.schema([("id", pa.int64())]), ("text",), unreadable)
    assert (part.count, unreadable.count) == (2, 1)
    with (
        closing(SqlSource(url, "nothing")) as absent,
        pytest.raises(InvalidCall, match="neither a table or view"),
    ):
        absent.columns()
    source.close()


def test_a_select_cannot_write(url: str) -> None:
    """A source is only read."""
    run(url, "CREATE TABLE t (id INTEGER, text TEXT)", "INSERT INTO t VALUES (1, 'a')")
    for select in ("SELECT 1 AS id; DELETE FROM t", "SELECT 1 AS id) AS s; DELETE FROM t; SELECT (1"):
        with closing(SqlSource(url, select)) as source, pytest.raises(InvalidCall):
            source.columns()
    source = SqlSource(url, "t")
    assert len(rows(source, ("id",), ("text",))) == 1
    source.close()


def test_types_of_mariadb(maria: str) -> None:
    """Keys keep their type; values are Python's, JSON decoded; times do not depend on the session's zone."""
    run(
        maria,
        "DROP TABLE IF EXISTS t",
        "CREATE TABLE t (id BIGINT UNSIGNED PRIMARY KEY, price DECIMAL(10, 2), day DATE, at TIMESTAMP NULL, "
        "j JSON, raw VARBINARY(9), name VARCHAR(20) COLLATE utf8mb4_bin UNIQUE)",
        "SET time_zone = '+05:00'",
        "INSERT INTO t VALUES (18446744073709551615, 1.50, '2026-11-22', '2026-11-22 05:00', '{\"a\": 1}', "
        "x'00ff', 'ä'), (2, 2, NULL, NULL, NULL, NULL, 'Ä')",
    )
    source = SqlSource(maria, "t")
    found = rows(source, ("id",), ("price", "day", "at", "j", "raw", "name"))
    assert found[0] == (Decimal(2), Decimal("2.00"), None, None, None, None, "Ä")
    source_ = SqlSource(maria, "SELECT * FROM t WHERE id > 2")
    kinds = source.key_types(("id", "price", "day", "at", "raw", "name"))
    assert kinds == [
        pa.decimal128(20, 0),
        pa.decimal128(10, 2),
        pa.date32(),
        pa.timestamp("us"),
        pa.binary(),
        pa.string(),
    ]
    read = [
        list(part.values([0]))
        for part in source_.parts(pa.schema([]), ("id", "price", "day", "at", "raw", "j"), Unreadable())
    ]
    at = dt.datetime(2026, 11, 22)
    assert read == [[[(2**64 - 1, Decimal("1.50"), at.date(), at, b"\0\xff", '{"a": 1}')]]]
    source.close()
    source_.close()


def test_mariadb_keeps_no_outputs(maria: str, pg: Place) -> None:
    """The call is refused at once, with the reason and the way out."""
    for url in (maria, "mssql+pyodbc://u@h/d", "oracle://u@h/d"):
        with pytest.raises(InvalidCall, match=r"MariaDB.*source=|driver"):
            Database(url)


@pytest.mark.parametrize("kind", ["", "BLOB"])
@pytest.mark.parametrize("select", ["t", "SELECT id, x FROM t"])
def test_keys_that_are_one_as_text(tmp_path: Path, kind: str, select: str) -> None:
    """SQLite distinguishes 1 and '1', keys of text do not, so such keys are refused."""
    (tmp_path / "f.db").touch()
    url = f"sqlite:///{tmp_path}/f.db"
    run(url, f"CREATE TABLE t (id {kind}, x TEXT)", "INSERT INTO t VALUES (1, 'a'), ('1', 'b'), ('2', 'c')")
    words = "several types that are the same as text, for example id='1'"
    with closing(SqlSource(url, select)) as source, pytest.raises(InvalidCall, match=words):
        source.identified_by(("id",))
    run(url, "DELETE FROM t WHERE id = '1'")
    with closing(SqlSource(url, select)) as source:
        assert source.identified_by(("id",))
