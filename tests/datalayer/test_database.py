"""A database: values of a select, selected rows, and outputs that hold each key exactly once."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import json
import logging
import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pyarrow as pa
import pytest
import sqlalchemy as sa

from tests.servers.databases import FLAT, NOW, OUT, TABLE, Place, either, every, keys, row, selection, sqlite
from tests.servers.postgres import Postgres
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable, SourceRow
from vllm_tasks.errors import InvalidCall, TablesUnavailable

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty SQLite file or PostgreSQL database."""
    yield from either(request, tmp_path)


# ---------------------------------------------------------------------- which rows


@pytest.mark.parametrize("select", ["t", "SELECT * FROM t"])
def test_what_is_selected(place: Place, select: str) -> None:
    """`missing`, `changed`, `failed` and `all` select by the outputs and their fingerprint."""
    db = place.fill(5)
    chosen = selection(select)
    db.check(chosen)
    assert keys(db, chosen) == [0, 1, 2, 3, 4]
    assert keys(db, replace(chosen, refresh="failed")) == []
    writer = db.writer(chosen, TABLE)
    assert keys(db, chosen) == [0, 1, 2, 3, 4]
    writer.commit(
        [row(0), row(1, _error="e"), row(2, _fingerprint="g"), row(3, _error="e", _fingerprint="g")], []
    )
    assert every(db, chosen) == [
        SourceRow((2,), ("text 2",), True, None),
        SourceRow((3,), ("text 3",), True, None),
        SourceRow((4,), ("text 4",), False, None),
    ]
    assert db.count(chosen) == (5, 3)
    changed = every(db, replace(chosen, refresh="changed"))
    assert [(r.redo, r.input_hash) for r in changed] == [
        (True, "h"),
        (True, "h"),
        (True, None),
        (True, None),
        (False, None),
    ]
    assert keys(db, replace(chosen, refresh="failed")) == [1, 3]
    assert keys(db, replace(chosen, refresh="all")) == [0, 1, 2, 3, 4]
    for since, failed, left in [
        (NOW, [3], [2, 3, 4]),
        (NOW + dt.timedelta(microseconds=1), [1, 3], [0, 1, 2, 3, 4]),
    ]:
        assert keys(db, replace(chosen, refresh="failed", since=since)) == failed
        assert keys(db, replace(chosen, refresh="all", since=since)) == left
        assert keys(db, replace(chosen, since=since)) == [2, 3, 4]


def test_ids_choose_rows(place: Place) -> None:
    """Only rows with these keys are selected, once each; ids that no row has select nothing."""
    db = place.fill(60_000)
    chosen = selection(ids=((3,), (4,), (3,), (77_777,)))
    db.writer(chosen, TABLE).commit([row(4)], [])
    assert keys(db, chosen) == [3]
    assert db.count(chosen) == (2, 1)
    assert keys(db, replace(chosen, ids=())) == []
    many = replace(chosen, ids=tuple((i,) for i in range(50_000)))
    assert sum(len(page) for page in db.rows(many, 10_000)) == 49_999
    for wrong in [("3",), (True,), (3.0,), (None,), (3, 4), ()]:
        with pytest.raises(InvalidCall, match=r"ids: .*is no value of the key id"):
            db.check(replace(chosen, ids=((1,), wrong)))


def test_composite_keys(place: Place) -> None:
    """A key of several columns is joined, chosen and replaced by all of them."""
    place.sql(
        "CREATE TABLE t (a VARCHAR(10) NOT NULL, b INTEGER NOT NULL, text TEXT, PRIMARY KEY (a, b))",
        "INSERT INTO t VALUES ('x', 1, 'x1'), ('x', 2, 'x2'), ('y', 1, 'y1')",
    )
    db = place.open()
    chosen = selection(key=("a", "b"), columns=("text", "b"))
    db.check(chosen)
    db.writer(chosen, TABLE).commit([row("x", 2, names=("a", "b"))], [])
    assert keys(db, chosen) == [("x", 1), ("y", 1)]
    some = replace(chosen, refresh="all", ids=(("x", 1), ("x", 2), ("y", 2)))
    assert every(db, some) == [
        SourceRow(("x", 1), ("x1", 1), False, None),
        SourceRow(("x", 2), ("x2", 2), True, "h"),
    ]


TYPED = [
    ("INTEGER", ["1", "-2"], pa.int64(), pa.int32()),
    ("BIGINT", [str(2**62)], pa.int64(), pa.int64()),
    ("TEXT", ["'a'", "'B%'", "'é'", "''"], pa.string(), pa.string()),
    ("VARCHAR(9)", ["'a '"], pa.string(), pa.string()),
    ("CHAR(4)", ["'ab'"], pa.string(), pa.string()),
    ("UUID", ["'b5b6ccae-0b1d-4b9a-8f1e-2f7f6a1c0d3e'"], pa.string(), pa.string()),
    ("DATE", ["'2026-11-22'"], pa.string(), pa.date32()),
    ("TIMESTAMP", ["'2026-11-22 01:02:03.000004'"], pa.string(), pa.timestamp("us")),
    ("NUMERIC(30, 2)", ["1.10", "2"], pa.string(), pa.string()),
]


@pytest.mark.parametrize(("kind", "values", "small", "large"), TYPED, ids=[t[0] for t in TYPED])
def test_keys_keep_their_type(place: Place, kind: str, values: list[str], small: Any, large: Any) -> None:
    """A key of any type is the same after it was read, committed and read again."""
    place.sql(f"CREATE TABLE t (id {kind} NOT NULL UNIQUE, text TEXT)")
    place.sql("INSERT INTO t VALUES " + ", ".join(f"({value}, 'x')" for value in values))
    for select in ("t", "SELECT id, text FROM t"):
        db = place.open()
        chosen = selection(select, outputs=f"_outputs__{len(select)}")
        db.check(chosen)
        writer = db.writer(chosen, replace(TABLE, name=chosen.outputs))
        assert db.outputs(chosen.outputs).num_rows == 0
        found = every(db, chosen)
        assert len(found) == len(values)
        writer.commit([row(*r.key) for r in found], [])
        writer.commit([row(*r.key) for r in found[:1]], [found[0].key])
        assert every(db, chosen) == []
        assert every(db, replace(chosen, refresh="all", ids=tuple(r.key for r in found))) == [
            replace(r, redo=True, input_hash="h") for r in found
        ]
        told = db.outputs(chosen.outputs)
        assert told.schema.field("id").type == (small if place.sqlite else large)
        assert sorted(map(str, told["id"].to_pylist())) == sorted(str(r.key[0]) for r in found)
        db.writer(chosen, replace(TABLE, name=chosen.outputs))  # the shape is the same
    db.close()


def test_postgres_keys_of_its_own(pg: Place) -> None:
    """Enums, zoned times and collations are kept, and an id may be the text of a UUID or a date."""
    moment = dt.datetime(2026, 11, 22, tzinfo=dt.UTC)
    pg.sql(
        "CREATE TYPE mood AS ENUM ('sad', 'happy')",
        'CREATE TABLE t (m mood, w TIMESTAMPTZ, c TEXT COLLATE "C", u UUID, d DATE, text TEXT)',
        "INSERT INTO t VALUES ('sad', '2026-11-22 00:00Z', 'x', 'b5b6ccae-0b1d-4b9a-8f1e-2f7f6a1c0d3e', "
        "'2026-11-22', 't')",
    )
    db = pg.open()
    chosen = selection(key=("m", "w", "c", "u", "d"))
    db.check(chosen)
    writer = db.writer(chosen, TABLE)
    (found,) = every(db, chosen)
    uuid = UUID("b5b6ccae-0b1d-4b9a-8f1e-2f7f6a1c0d3e")
    assert found.key == ("sad", moment, "x", uuid, dt.date(2026, 11, 22))
    writer.commit([row(*found.key, names=chosen.key)], [])
    db.writer(chosen, TABLE)
    assert every(db, chosen) == []
    as_text = ("sad", "2026-11-22T00:00:00Z", "x", str(uuid), "2026-11-22")
    assert len(every(db, replace(chosen, refresh="all", ids=(as_text, found.key)))) == 1
    assert ("C",) in pg.sql(
        "SELECT collname FROM pg_attribute a JOIN pg_collation c ON c.oid = attcollation "
        f"WHERE attrelid = '{OUT}'::regclass AND attname = 'c'"
    )
    with pytest.raises(InvalidCall, match="nonsense"):
        every(db, replace(chosen, ids=(("sad", "2026-11-22", "x", "nonsense", "2026-11-22"),)))


def test_times_that_python_has_not(pg: Place) -> None:
    """Infinity, years before Christ or after 9999 arrive as text, in values, keys and arrays."""
    pg.sql(
        "CREATE TABLE t (id TIMESTAMPTZ PRIMARY KEY, day DATE, at TIMESTAMP, clock TIME, days DATE[])",
        "INSERT INTO t VALUES ('infinity', '0044-03-15 BC', '294276-01-01', '24:00', '{-infinity}'), "
        "('0044-03-15 BC', '2026-11-23', NULL, '01:02', NULL)",
    )
    db = pg.open()
    chosen = selection(columns=("day", "at", "clock", "days"))
    db.check(chosen)
    writer = db.writer(chosen, TABLE)
    found = every(db, chosen)
    assert found[0].key[0].startswith("0044-03-15")
    assert found[0].values == (dt.date(2026, 11, 23), None, dt.time(1, 2), None)
    assert found[1].key == ("infinity",)
    assert found[1].values == ("0044-03-15 BC", "294276-01-01 00:00:00", "24:00:00", ["-infinity"])
    writer.commit([row(*r.key) for r in found], [])
    assert every(db, chosen) == []
    assert db.count(chosen) == (2, 0)
    assert sorted(db.outputs(OUT)["id"].to_pylist()) == sorted(r.key[0] for r in found)


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_times_are_the_same_in_every_zone(pg: Place, zone: str) -> None:
    """Values do not depend on the time zone of the session, because their hash is kept."""
    pg.sql(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, at TIMESTAMPTZ, took INTERVAL)",
        "INSERT INTO t VALUES (1, '2026-11-22 12:00Z', '1 day')",
    )
    pg.url += f"&options=-c TimeZone={zone} -c DateStyle=German -c IntervalStyle=iso_8601".replace(" ", "%20")
    ((at, took),) = [r.values for r in every(pg.open(), selection(columns=("at", "took")))]
    assert str(at) == "2026-11-22 12:00:00+00:00"
    assert took == dt.timedelta(days=1)


# ---------------------------------------------------------------------- what is refused


def test_bad_keys_are_refused_with_count_and_example(place: Place) -> None:
    """Keys that are NULL, not unique or floating are refused before any work."""
    place.sql(
        "CREATE TABLE t (id INTEGER, b INTEGER, f DOUBLE PRECISION, text TEXT)",
        "INSERT INTO t VALUES (1, 1, 1, 'a'), (7, 2, 1, 'b'), (7, 2, 1, 'c'), (7, 3, 1, 'd')",
        "INSERT INTO t VALUES (NULL, 4, 1, 'e')",
    )
    db = place.open()
    with pytest.raises(InvalidCall, match=r"id is not unique: 1 keys occur in 3 rows.* id=7 in 3"):
        db.check(selection())
    with pytest.raises(InvalidCall, match=r"id, b is not unique: 1 keys occur in 2 rows.* id=7, b=2 in 2"):
        db.check(selection(key=("id", "b")))
    with pytest.raises(InvalidCall, match=r"id, b is NULL in 1 rows, for example id=None, b=4"):
        db.check(selection("SELECT * FROM t WHERE b <> 2", key=("id", "b")))
    with pytest.raises(InvalidCall, match="'f' is a floating-point number"):
        db.check(selection(key=("f",)))
    db.check(selection("SELECT * FROM t WHERE b <> 2 AND id IS NOT NULL", key=("id", "b")))


@pytest.mark.parametrize("kind", ["f", "g", "j", "a", "r", "h", "hs", "xs"])
def test_postgres_types_that_are_no_keys(pg: Place, kind: str) -> None:
    """A domain counts as its base type; a type without a hash or an equality is refused."""
    pg.sql(
        "CREATE SCHEMA x",
        "CREATE EXTENSION IF NOT EXISTS hstore",
        "CREATE DOMAIN f AS real",
        "CREATE DOMAIN x.g AS f",
        "CREATE DOMAIN h AS hstore",
        "CREATE TABLE t (f f, g x.g, j jsonb, a integer[], r int4multirange, h h, hs hstore, text TEXT)",
        "ALTER TABLE t ADD xs hstore[]",
    )
    try:
        with pytest.raises(InvalidCall, match=f"the key '{kind}' is .*identify a row"):
            pg.open().check(selection(key=(kind,)))
    finally:
        pg.sql("DROP SCHEMA x CASCADE")


def test_a_domain_may_be_a_key(pg: Place) -> None:
    """A domain over text or numbers is kept as it is."""
    pg.sql(
        'CREATE DOMAIN "My Code" AS TEXT COLLATE "C"',
        'CREATE TABLE t (id "My Code" PRIMARY KEY, text TEXT)',
        "INSERT INTO t VALUES ('a', 'x'), ('b', 'y')",
    )
    db = pg.open()
    db.check(selection())
    db.writer(selection(), TABLE).commit([row("a")], [])
    db.writer(selection(), TABLE)
    assert keys(db, selection(ids=(("a",), ("b",)))) == ["b"]


def test_boolean_keys(place: Place) -> None:
    """True and False identify rows, and may be given as ids."""
    place.sql(
        "CREATE TABLE t (id INTEGER, b BOOLEAN, text TEXT, PRIMARY KEY (id, b))",
        "INSERT INTO t VALUES (1, TRUE, 'x'), (1, FALSE, 'y'), (2, FALSE, 'z')",
    )
    db = place.open()
    chosen = selection(key=("id", "b"), ids=((1, True), (2, True), (2, False)))
    db.check(chosen)
    writer = db.writer(chosen, TABLE)
    assert keys(db, chosen) == [(1, True), (2, False)]
    writer.commit([row(1, True, names=("id", "b"))], [])
    assert keys(db, chosen) == [(2, False)]
    with pytest.raises(InvalidCall, match="ids"):
        db.check(replace(chosen, ids=((True, True),)))


def test_half_a_character(place: Place) -> None:
    """A lone surrogate, which no database takes, is refused in a select, its names and ids."""
    place.sql("CREATE TABLE t (id VARCHAR(9) NOT NULL PRIMARY KEY, text TEXT)")
    db = place.open()
    for wrong in (
        selection("\ud800"),
        selection("SELECT id, '\ud800' AS text FROM t"),
        selection(key=("\ud800",)),
        selection(ids=(("\ud800",),)),
    ):
        with pytest.raises(InvalidCall, match=r"\\ud800"):
            db.check(wrong)


def test_a_statement_is_told_from_a_name_at_once(tmp_path: Path) -> None:
    """A statement is recognised after any number of comments."""
    place = sqlite(tmp_path)
    db = place.fill(1)
    began = time.monotonic()
    for odd in ("/**/" * 5000, "/**/ " * 5000 + "/*", "-- x\n(" * 5000, "/*" * 5000):
        with pytest.raises(InvalidCall, match="no SELECT"):
            db.check(selection(odd + "nothing"))
    db.check(selection("/**/" * 5000 + "SELECT * FROM t"))
    assert time.monotonic() - began < 2
    with pytest.raises(InvalidCall, match="exactly one SELECT statement"):
        db.check(selection("SELECT 1; SELECT 2"))
    db.close()


def test_unique_keys_cost_nothing_where_an_index_says_so(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A primary key or a plain unique index is believed; a partial one, or one on an expression, is not."""
    caplog.set_level(logging.INFO, "vllm_tasks")
    place.sql(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u TEXT NOT NULL UNIQUE, p TEXT, e TEXT, text TEXT)",
        "CREATE UNIQUE INDEX partial ON t (p) WHERE p <> 'x'",
        "CREATE UNIQUE INDEX expression ON t (lower(e))",
        "INSERT INTO t VALUES (1, '1', 'x', 'e', ''), (2, '2', 'y', 'f', '')",
    )
    db = place.open()
    for key in [("id",), ("u",), ("id", "e")]:
        db.check(selection(key=key))
        assert not caplog.records
    for key in [("p",), ("e",), ("p", "e")]:
        db.check(selection(key=key))
        assert "no unique index" in caplog.text
        caplog.clear()
    place.sql("CREATE TABLE n (id TEXT UNIQUE)", "INSERT INTO n VALUES ('a'), (NULL), (NULL)")
    with pytest.raises(InvalidCall, match="id is NULL in 2 rows"):
        db.check(selection("n", columns=()))
    assert not caplog.records


def test_postgres_indexes_that_promise_nothing(pg: Place) -> None:
    """An index left invalid, and one on the parent of inherited tables, are not believed."""
    pg.sql("CREATE TABLE t (id INTEGER NOT NULL, text TEXT)", "INSERT INTO t VALUES (1, ''), (1, '')")
    alone = pg.engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.connect() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.exec_driver_sql("CREATE UNIQUE INDEX CONCURRENTLY bad ON t (id)")
    pg.sql("CREATE TABLE p (id INTEGER PRIMARY KEY, text TEXT)", "CREATE TABLE c () INHERITS (p)")
    pg.sql("INSERT INTO p VALUES (1, '')", "INSERT INTO c VALUES (1, '')")
    for table in ("t", "p"):
        with pytest.raises(InvalidCall, match="not unique"):
            pg.open().check(selection(table))


def test_names_that_are_not_there(place: Place) -> None:
    """An unknown table or column is refused with the nearest name and what there is."""
    db = place.fill()
    place.sql("CREATE VIEW seen AS SELECT * FROM t")
    db.check(selection("seen"))
    db.check(selection("main.t" if place.sqlite else "public.t"))
    with pytest.raises(InvalidCall, match=r"'sen' is no table .* did you mean 'seen'\?; there is .*'t'"):
        db.check(selection("sen"))
    with pytest.raises(
        InvalidCall, match=r"'t' has no column 'txt'; did you mean 'text'\?; there is 'id', 'text'"
    ):
        db.check(selection(columns=("txt",)))
    if not place.sqlite:  # which calls the second `id:1`
        with pytest.raises(InvalidCall, match="more than one column 'id'"):
            db.check(selection("SELECT a.*, b.* FROM t a JOIN t b ON a.id = b.id"))
    for wrong in [
        "",
        "DELETE FROM t",
        "SELECT nope FROM t",
        "SELECT 1 AS id, '\0' AS text",
        "SELECT",
        "VALUES (1)",
        "t; DROP TABLE t",
    ]:
        with pytest.raises(InvalidCall):
            db.check(selection(wrong))


HOSTILE = [
    'a"b',
    "a'b; DROP TABLE t; --",
    "100%",
    "%s %(x)s",
    ":x ::y",
    "a b.c",
    "größe 数",
    "select",
    "\\:q [z]",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_names(place: Place, name: str) -> None:
    """Quotes, semicolons, percents, colons, spaces and words of SQL in names are quoted."""
    table, column, text = ('"' + n.replace('"', '""') + '"' for n in (f"t {name}", name, name + "2"))
    place.sql(
        f"CREATE TABLE {table} ({column} INTEGER NOT NULL PRIMARY KEY, {text} TEXT)",
        f"INSERT INTO {table} VALUES (1, 'x'), (2, 'y')",
    )
    db = place.open()
    outputs = f"_outputs__{name}"
    chosen = selection(f"t {name}", key=(name,), columns=(name + "2",), outputs=outputs, ids=((1,), (2,)))
    db.check(chosen)
    writer = db.writer(chosen, OutputTable(outputs, (OutputColumn(name + "3", "json"),)))
    assert [r.values for r in every(db, chosen)] == [("x",), ("y",)]
    made = row(1, names=(name,)) | {name + "3": {name: name}}
    del made["output"]
    writer.commit([made], [(1,)])
    assert [r.key for r in every(db, chosen)] == [(2,)]
    assert db.outputs(outputs).column_names[:2] == [name, name + "3"]


def test_a_statement_is_read_as_it_is_written(place: Place) -> None:
    """Colons, percents, backslashes, comments and a semicolon at the end reach the database unchanged."""
    db = place.fill(3)
    text = r"a:id %s 100% \:x %(y)s ::z {b} ; --"
    select = f"-- first\n/* % :x */ SELECT id, '{text}' AS text FROM t WHERE id % 2 = 0 ; \n"
    db.check(selection(select))
    assert [(r.key[0], r.values[0]) for r in every(db, selection(select))] == [(0, text), (2, text)]
    with_ = "WITH x AS (SELECT * FROM t WHERE id = 1) SELECT * FROM x -- the end"
    db.check(selection(with_))
    assert keys(db, selection(with_)) == [1]


WRITES = [
    "WITH gone AS (DELETE FROM t RETURNING *) SELECT * FROM gone",
    "SELECT * FROM t; DELETE FROM t",
    "SELECT 1 AS id, '' AS text) AS s; COMMIT; DELETE FROM t; SELECT * FROM (SELECT 1 AS id, '' AS text",
    "SELECT writes() AS id, '' AS text",
    "SELECT nextval('numbers') AS id, '' AS text",
]


@pytest.mark.parametrize("select", WRITES)
def test_a_select_that_writes_is_refused(place: Place, select: str) -> None:
    """Nothing is written by any `select`, at any stage."""
    db = place.fill(3)
    if not place.sqlite:
        place.sql(
            "CREATE SEQUENCE numbers",
            "CREATE FUNCTION writes() RETURNS BIGINT LANGUAGE sql AS 'DELETE FROM t RETURNING id'",
        )
    for step in (
        lambda: db.check(selection(select)),
        lambda: every(db, selection(select)),
        lambda: db.count(selection(select)),
    ):
        with pytest.raises(InvalidCall):
            step()
        assert place.sql("SELECT count(*) FROM t") == [(3,)]
    if not place.sqlite:
        assert place.sql("SELECT is_called FROM numbers") == [(False,)]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://u:s3cret@h:port/d", "not a SQLAlchemy URL"),
        ("postgresql://u:s3cret@127.0.0.1:9/d?nonsense=s3cret", "nonsense"),
        ("nonsense://u:s3cret@h/d", "'nonsense' is not a dialect"),
        ("postgresql+asyncpg://u:s3cret@h/d", "needs the driver psycopg"),
        ("postgresql+psycopg2://u:s3cret@h/d", "needs the driver psycopg"),
        ("postgresql+psycopg_async://u:s3cret@h/d", "needs the driver psycopg"),
        ("mysql+mysqldb://u:s3cret@h/d", "driver"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite:////nowhere/x.db", "there is no database '/nowhere/x.db'"),
    ],
)
def test_urls_that_cannot_be_meant(url: str, told: str) -> None:
    """A URL is refused for a reason, without its password."""
    with pytest.raises(InvalidCall, match=told) as refused:
        Database(url).check(selection())
    assert "s3cret" not in str(refused.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install for psycopg."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidCall, match=r"pip install 'vllm-tasks\[postgres\]'"):
        Database("postgresql://u@h/d")


def test_the_password_is_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `where` nor an error shows the password; a server that is away counts as temporary."""
    db = Database("postgresql://u:s3cret@127.0.0.1:9/d?password=s3cret")
    assert db.where("x") == "table x in postgresql://u@127.0.0.1:9/d"
    with pytest.raises(TablesUnavailable) as lost:
        db.check(selection())
    error: BaseException | None = lost.value
    while error:
        assert "s3cret" not in f"{error} {error!r}"
        error = error.__cause__
    monkeypatch.chdir(tmp_path)
    Path("t.db").touch()
    relative = Database("sqlite:///t.db")
    monkeypatch.chdir("/")
    assert relative.where("x") == f"table x in sqlite:///{tmp_path}/t.db"
    with pytest.raises(InvalidCall, match="no table 'x'"):
        relative.outputs("x")
    relative.close()
    db.close()


def test_no_right_to_write(place: Place, tmp_path: Path) -> None:
    """A database that may only be read is the call's fault, and no reason to wait."""
    db = place.fill()
    if place.sqlite:
        if os.getuid() == 0:
            pytest.skip("root writes everywhere")
        (tmp_path / "t.db").chmod(0o444)
    else:
        place.sql("DO $$ BEGIN CREATE ROLE reader LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
        place.sql("GRANT SELECT ON t TO reader")
        place.url = place.url.replace("tests@", "reader@")
        db = place.open()
        assert keys(db, selection()) == list(range(10))
    with pytest.raises(InvalidCall, match=r"permission denied|readonly"):
        db.writer(selection(), TABLE)


# ---------------------------------------------------------------------- the outputs table


def test_outputs_read_back_exactly(place: Place) -> None:
    """Each type of column comes back as it went in, and an empty table has the right types."""
    db = place.fill()
    kinds = ("str", "int", "float", "bool", "json", "bytes")
    table = OutputTable(OUT, tuple(OutputColumn(kind + "_", kind) for kind in kinds))
    writer = db.writer(selection(), table)
    types = [pa.int64(), pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.binary()]
    assert db.outputs(OUT).schema.types[:7] == types
    assert db.outputs(OUT).schema.field("_created_at").type == pa.timestamp("us", "UTC")
    values = ["é 数 %s :x", -(2**63), 1e-300, True, {"a": [1, None, "é"]}, b"\0\xff"]
    made = row(1) | dict(zip([k + "_" for k in kinds], values, strict=True))
    empty = row(2) | {k + "_": None for k in kinds}
    del made["output"], empty["output"]
    writer.commit([made, empty], [])
    told = sorted(db.outputs(OUT).to_pylist(), key=lambda r: r["id"])
    assert told == [made | {"json_": '{"a": [1, null, "é"]}'}, empty]
    assert db.outputs(OUT).schema.types[:7] == types


def test_what_cannot_be_stored_is_told_before_anything_is_sent(place: Place) -> None:
    """A row that the database cannot hold is named; the commit fails, and nothing of it is written."""
    db = place.fill()
    columns = (OutputColumn("output", "str"), OutputColumn("j", "json"), OutputColumn("i", "int"))
    writer: Any = db.writer(selection(), OutputTable(OUT, columns))
    fine = row(1, j=None, i=1)
    wrong: list[dict[str, Any]] = [{"output": "\ud800"}, {"j": float("nan")}, {"j": {1, 2}}, {"i": 2**63}]
    if not place.sqlite:
        wrong += [{"output": "a\0"}, {"j": ["\0"]}]
    for bad in wrong:
        assert f"column {next(iter(bad))!r}: " in writer.unstorable(row(2, j=None, i=1) | bad)
        with pytest.raises(ValueError, match=r"the key \(2,\): column"):
            writer.commit([fine, row(2, j=None, i=1) | bad], [])
    assert writer.unstorable(fine) is None
    assert place.outputs() == []
    spelled = ["\\u0000", {"\\\\u0000": "\\"}]
    for n, j in enumerate(spelled):
        assert writer.unstorable(row(n, j=j, i=1)) is None
    if not place.sqlite:
        assert writer.unstorable(row(1, j=["\\\0"], i=1))
    writer.commit([row(n, j=j, i=1) for n, j in enumerate(spelled)], [])
    assert [json.loads(told) for told in db.outputs(OUT)["j"].to_pylist()] == spelled


def test_a_table_of_another_shape_is_refused(place: Place) -> None:
    """An outputs table with other columns or types is left alone, and the way out is named."""
    db = place.fill()
    db.writer(selection(), TABLE)
    db.writer(selection(), TABLE)
    db.check(selection())
    for other in (
        FLAT,
        OutputTable(OUT, (OutputColumn("output", "int"),)),
        OutputTable(OUT, (OutputColumn("output", "json"), OutputColumn("x", "int"))),
    ):
        with pytest.raises(InvalidCall, match=r"another shape.*another predict_id"):
            db.writer(selection(), other)
    by_text = selection("SELECT CAST(id AS TEXT) AS id, text FROM t")
    for refused in (lambda: db.check(by_text), lambda: db.writer(by_text, TABLE)):
        with pytest.raises(InvalidCall, match="'id' is"):
            refused()


@pytest.mark.parametrize(
    ("table", "key", "told"),
    [
        (replace(TABLE, partition_by=("id",)), "id", "lake"),
        (replace(TABLE, compression="zstd"), "id", "lake"),
        (OutputTable(OUT, (OutputColumn("id", "str"),)), "id", "more than one column 'id'"),
        (OutputTable(OUT, (OutputColumn("_error", "str"),)), "id", "more than one column '_error'"),
        (TABLE, "_position", "more than one column '_position'"),
    ],
)
def test_columns_that_collide(place: Place, table: OutputTable, key: str, told: str) -> None:
    """Names that stand for two columns, and options for lakes only, are refused."""
    place.sql(f"CREATE TABLE t ({key} INTEGER PRIMARY KEY, text TEXT)")
    with pytest.raises(InvalidCall, match=told):
        place.open().writer(selection(key=(key,)), table)


def test_a_key_too_long_for_an_index(place: Place) -> None:
    """A key that PostgreSQL's index cannot hold is reported; a long one that can be compressed is kept."""
    long = random.Random(0).randbytes(3000).hex()
    place.sql("CREATE TABLE t (id TEXT, text TEXT)", f"INSERT INTO t VALUES ('{'a' * 6000}', 'x')")
    db = place.open()
    writer = db.writer(selection(), TABLE)
    fits = [row("a" * 6000), row(long[:2600])] + ([row(long)] if place.sqlite else [])
    assert [writer.unstorable(r) for r in fits] == [None] * len(fits)
    writer.commit(fits, [])
    assert keys(db, selection()) == []
    if not place.sqlite:
        assert "'id': 6,000 bytes are too long for the index" in str(writer.unstorable(row(long)))


def test_names_that_sqlite_does_not_tell_apart(tmp_path: Path) -> None:
    """Outputs whose names differ in case would share a table; the second is refused."""
    place = sqlite(tmp_path)
    db = place.fill()
    db.writer(selection(), TABLE).commit([row(1)], [])
    other = OUT.upper()
    for refused in (
        lambda: db.check(selection(outputs=other)),
        lambda: db.writer(selection(outputs=other), replace(TABLE, name=other)),
        lambda: db.outputs(other),
    ):
        with pytest.raises(InvalidCall, match=rf"'{OUT}'.*is the same as '{other}'.*another predict_id"):
            refused()
    db.close()


def test_a_name_too_long_for_postgres(pg: Place) -> None:
    """PostgreSQL would silently truncate it, and two predict_ids would share a table."""
    db = pg.fill()
    with pytest.raises(InvalidCall, match="63 bytes"):
        db.writer(selection(), replace(TABLE, name="_outputs__" + "é" * 30))


def test_two_that_make_the_table_at_once(place: Place) -> None:
    """Writers that start together all get the one table."""
    place.fill()
    start = threading.Barrier(4)
    failed: list[BaseException] = []

    def make(db: Database, table: OutputTable) -> None:
        start.wait()
        try:
            db.writer(selection(), table)
        except BaseException as e:  # noqa: BLE001 (shown by the test)
            failed.append(e)

    for n in range(5):
        table = replace(FLAT if n % 2 else TABLE, name=f"_outputs__{n}")
        threads = [threading.Thread(target=make, args=(place.open(), table)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_flattened_outputs(place: Place) -> None:
    """A redone key takes all its old positions with it; an empty list is one row, and done."""
    db = place.fill(4)
    chosen = selection()
    writer = db.writer(chosen, FLAT)
    db.writer(chosen, FLAT)
    writer.commit([row(0, _position=p) for p in range(3)] + [row(1, _position=None), row(2, _position=0)], [])
    assert keys(db, chosen) == [3]
    assert keys(db, replace(chosen, refresh="all")) == [0, 1, 2, 3]
    writer.commit([row(0, _position=None), row(1, _position=0), row(1, _position=1)], [(0,), (1,)])
    assert place.outputs("_position") == [(0, None), (1, 0), (1, 1), (2, 0)]
    writer.commit([row(2, _position=None, _error="e")], [(2,)])
    assert keys(db, replace(chosen, refresh="failed")) == [2]
    assert db.count(chosen) == (4, 1)


# ---------------------------------------------------------------------- exactly once


def commit_groups(url: str, name: str, groups: int, begun: Any = None) -> None:
    """Commits groups of the same keys as the other processes do."""
    db = Database(url)
    writer = db.writer(selection(), FLAT)
    for n in range(groups):
        chosen = random.sample(range(60), 20)
        rows = [row(k, output=f"{name} {n}", _position=p) for k in chosen for p in range(1 + (k + n) % 3)]
        writer.commit(rows, [])
        if begun and not n:
            begun.set()
    db.close()


def whole(place: Place) -> bool:
    """Whether each key has the positions 0, 1, ... of one commit."""
    by_key: dict[Any, list[tuple[Any, Any]]] = {}
    for key, position, output in place.sql(f'SELECT id, _position, output FROM "{OUT}"'):
        by_key.setdefault(key, []).append((position, output))
    return all(
        sorted(p for p, _ in rows) == list(range(len(rows))) and len({o for _, o in rows}) == 1
        for rows in by_key.values()
    )


def test_four_writers_of_the_same_keys(place: Place) -> None:
    """None fails, and each key is there once, as one of them wrote it."""
    place.fill(60)
    writers = [PROCESSES.Process(target=commit_groups, args=(place.url, f"w{n}", 40)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len({k for k, _ in place.outputs()}) == 60
    assert whole(place)


def test_a_writer_killed_at_any_moment(place: Place) -> None:
    """Committed groups are complete, others leave nothing, and the next writer resumes."""
    place.fill(60)
    begun = PROCESSES.Event()
    for _ in range(3):
        process = PROCESSES.Process(target=commit_groups, args=(place.url, "k", 10**9, begun))
        process.start()
        assert begun.wait(60)
        begun.clear()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        process.close()
        assert whole(place)
    commit_groups(place.url, "n", 3)
    assert whole(place)


def test_a_commit_whose_acknowledgement_was_lost(place: Place) -> None:
    """A repeated commit replaces itself, or the commit of a concurrent writer."""
    db = place.fill()
    for table in (TABLE, replace(FLAT, name="_outputs__flat")):
        extra = {"_position": 0} if table.flatten else {}
        writer = db.writer(selection(), table)
        writer.commit([row(k, output="first", **extra) for k in range(3)], [])
        writer.commit([row(k, output="again", **extra) for k in range(3)], [])
        rival = place.open().writer(selection(), table)
        rival.commit([row(k, output="rival", **extra) for k in range(2, 5)], [])
        found = db.outputs(table.name)
        assert Counter(found["output"].to_pylist()) == {"again": 2, "rival": 3}
        writer.commit([], [])


def test_a_key_that_comes_twice_in_a_commit(place: Place) -> None:
    """If a key comes up twice, the later outcome is kept, with its positions and no others."""
    db = place.fill()
    db.writer(selection(), TABLE).commit([row(1, output="first"), row(2), row(1, output="later")], [])
    assert place.outputs() == [(1, "later"), (2, "o")]
    flat = replace(FLAT, name="_outputs__flat")
    writer = db.writer(selection(), flat)
    twice = [row(1, output="first", _position=p) for p in range(3)]
    twice += [row(1, output="later", _position=p) for p in range(2)]
    writer.commit([*twice, row(2, _position=0), row(3, _position=0), row(3, _position=None)], [(3,)])
    writer.commit([row(4, _position=None), row(4, _position=0), row(4, _position=1)], [])
    assert sorted(place.sql('SELECT id, coalesce(_position, -1), output FROM "_outputs__flat"')) == [
        (1, 0, "later"),
        (1, 1, "later"),
        (2, 0, "o"),
        (3, -1, "o"),
        (4, 0, "o"),
        (4, 1, "o"),
    ]


def test_postgres_restarted(pg: Place, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost server is `TablesUnavailable`, nothing of the commit is written, and later it is repeated."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    db = pg.fill(30_000)
    writer = db.writer(selection(), TABLE)
    writer.commit([row(0)], [])
    pages = db.rows(selection(), 10)
    next(pages)
    for end in (postgres.stop, postgres.kill):
        end()
        with pytest.raises(TablesUnavailable):
            writer.commit([row(1)], [])
        with contextlib.closing(pages), pytest.raises(TablesUnavailable):
            list(pages)
        postgres.start()
        assert pg.outputs() == [(0, "o")]
        pages = db.rows(selection(), 10)
        next(pages)
        writer.commit([row(0)], [(0,)])
    pages.close()
    assert writer.commit([row(1)], []) is None
    assert pg.outputs() == [(0, "o"), (1, "o")]


def test_postgres_killed_during_commits(pg: Place, postgres: Postgres) -> None:
    """A commit is complete or absent at any moment, and repeating it succeeds."""
    db = pg.fill(2000)
    writer = db.writer(selection(), TABLE)
    for round_ in range(2):
        rows = [row(k, output=str(round_)) for k in range(2000)]
        killer = threading.Timer(random.uniform(0.0, 0.05), postgres.kill)
        killer.start()
        with contextlib.suppress(TablesUnavailable):
            while True:
                writer.commit(rows, [])
        killer.join()
        postgres.start()
        assert {o for _, o in pg.outputs()} in ({str(round_)}, {str(round_ - 1)}, set())
        writer.commit(rows, [])
        assert pg.outputs() == sorted((k, str(round_)) for k in range(2000))


def test_a_full_disk(tmp_path: Path) -> None:
    """A full disk is `TablesUnavailable`, nothing of the commit is kept, and with space again it succeeds."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    place = sqlite(disk)
    try:
        db = place.fill()
        writer = db.writer(selection(), TABLE)
        writer.commit([row(0)], [])
        (disk / "filler").write_bytes(b"x" * 600_000)
        with pytest.raises(TablesUnavailable, match="full"):
            writer.commit([row(k, output="x" * 100_000) for k in range(1, 10)], [])
        assert place.outputs() == [(0, "o")]
        (disk / "filler").unlink()
        writer.commit([row(k) for k in range(1, 10)], [])
        assert len(place.outputs()) == 10
        db.close()
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("journal", ["wal", "delete"])
@pytest.mark.parametrize("select", ["t", "SELECT * FROM t"])
def test_sqlite_reads_while_it_is_written(tmp_path: Path, journal: str, select: str) -> None:
    """A read that waits between two pages holds up no commit, and sees each row once."""
    place = sqlite(tmp_path)
    place.sql(f"PRAGMA journal_mode = {journal}")
    db = place.fill(100)
    chosen = selection(select)
    writer = db.writer(chosen, TABLE)
    seen = []
    for page in db.rows(chosen, 10):
        began = time.monotonic()
        writer.commit([row(*r.key) for r in page], [])
        place.sql("UPDATE t SET text = 'changed'", "DELETE FROM t WHERE id = 99")
        assert time.monotonic() - began < 5
        seen += [r.key[0] for r in page]
    assert seen == list(range(100 if select != "t" else 99))
    assert len(place.outputs()) == len(seen)
    db.close()


SOURCES = {
    "a table": ("CREATE TABLE s (id INTEGER PRIMARY KEY, text TEXT)", "s"),
    "its rowid taken": ("CREATE TABLE s (id BIGINT PRIMARY KEY, text TEXT, RowId TEXT)", "S"),
    "no rowid": ("CREATE TABLE s (id INTEGER PRIMARY KEY, text TEXT) WITHOUT ROWID", "s"),
    "no name left": ("CREATE TABLE s (id BIGINT PRIMARY KEY, text TEXT, rowid, oid, _rowid_)", "main.s"),
    "a view": ("CREATE VIEW s AS SELECT * FROM t", "s"),
    "a statement": ("CREATE TABLE s (id INTEGER PRIMARY KEY, text TEXT)", "SELECT * FROM s"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sqlite_counts_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The parts add up for any source, however far apart its rows are."""
    monkeypatch.setattr("vllm_tasks.datalayer.database.sqlite.COUNTED", 7)
    place = sqlite(tmp_path)
    db = place.fill(50)
    made, select = SOURCES[kind]
    place.sql("UPDATE t SET id = (id - 20) * 1000000000000", made)
    if kind != "a view":
        place.sql("INSERT INTO s (id, text) SELECT * FROM t")
    chosen = selection(select)
    writer = db.writer(chosen, TABLE)
    assert db.count(chosen) == (50, 50)
    writer.commit([row((n - 20) * 10**12) for n in range(0, 50, 2)], [])
    assert db.count(chosen) == (50, 25)
    assert db.count(replace(chosen, ids=((0,), (10**12,), (1,)))) == (2, 1)
    if kind != "a view":
        place.sql("DELETE FROM s")
        assert db.count(chosen) == (0, 0)
    db.close()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_count_holds_up_no_commit_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    """Without a write-ahead log, a count that takes too long in one read gives up."""
    monkeypatch.setattr("vllm_tasks.datalayer.database.sqlite.COUNT_TIMEOUT", 0.2)
    place = sqlite(tmp_path)
    place.sql(f"PRAGMA journal_mode = {journal}")
    db = place.fill(60_000)
    writer = db.writer(selection(), TABLE)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000) "
    slow = selection(numbers + "SELECT i AS id, text FROM n JOIN t ON t.id = n.i % 10")
    if journal == "wal":
        assert db.count(slow) == (2_000_001, 2_000_001)
    else:
        began = time.monotonic()
        with pytest.raises(TablesUnavailable, match="journal_mode"):
            db.count(slow)
        assert time.monotonic() - began < 2
    writer.commit([row(0)], [])
    assert db.count(selection()) == (60_000, 59_999)
    db.close()


def test_text_that_is_no_text(tmp_path: Path) -> None:
    """Bytes in SQLite that are not UTF-8 spoil the value that has them, and not the query."""
    place = sqlite(tmp_path)
    db = place.fill(2)
    place.sql("UPDATE t SET text = CAST(x'61ff' AS TEXT) WHERE id = 1")
    assert [r.values for r in every(db, selection())] == [("text 0",), ("a\udcff",)]
    db.close()


@pytest.mark.parametrize("kind", ["BLOB", "TEXT"])
def test_shards_of_keys_that_are_no_text(tmp_path: Path, kind: str) -> None:
    """Keys in SQLite that are not UTF-8 have their shard, and those that are keep the one they always had."""
    db = sqlite(tmp_path).fill(1)
    keys = " UNION ALL ".join(f"SELECT CAST(x'{k}' AS {kind}) AS id" for k in ("ff00", "61ff", "c3a9", "62"))
    select = f"SELECT id, 1 AS text FROM ({keys})"
    shards = [{r.key[0] for r in every(db, selection(select, shard=(i, 2)))} for i in range(2)]
    of_bytes = [{b"a\xff", "é".encode()}, {b"b", b"\xff\0"}]
    of_text = [{key.decode(errors="surrogateescape") for key in shard} for shard in of_bytes]
    assert shards == (of_bytes if kind == "BLOB" else of_text)
    db.close()


def test_a_locked_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that outlasts the grace period is `TablesUnavailable`, and the commit may be repeated."""
    monkeypatch.setattr("vllm_tasks.datalayer.database.backends.WAIT", 0.1)
    place = sqlite(tmp_path)
    db = place.fill()
    writer = db.writer(selection(), TABLE)
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TablesUnavailable, match="locked"):
            writer.commit([row(1)], [])
        with pytest.raises(TablesUnavailable, match="locked"):
            every(db, selection())
        other.execute("COMMIT")
    writer.commit([row(1)], [])
    assert place.outputs() == [(1, "o")]
    db.close()


def test_a_locked_postgres(pg: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer's lock that outlasts the wait is `TablesUnavailable`; the commit may be repeated."""
    monkeypatch.setattr("vllm_tasks.datalayer.database.backends.WAIT", 0.1)
    db = pg.fill()
    writer = db.writer(selection(), TABLE)
    lock = f"SELECT pg_advisory_xact_lock(hashtextextended('{OUT}', 0))"
    for other in (lock, f"LOCK TABLE {OUT}"):
        with pg.engine.begin() as connection:
            connection.exec_driver_sql(other)
            with pytest.raises(TablesUnavailable, match="lock timeout"):
                writer.commit([row(1)], [])
    writer.commit([row(1)], [])
    assert pg.outputs() == [(1, "o")]


def test_a_postgres_transaction_timeout_may_pass(pg: Place) -> None:
    """The end that PostgreSQL 17 makes of a long transaction is `TablesUnavailable`."""
    db = pg.fill()
    writer = db.writer(selection(), TABLE)
    pg.sql(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'late' USING ERRCODE = '25P04'; END $$",
        f"CREATE TRIGGER late BEFORE INSERT ON {OUT} EXECUTE FUNCTION late()",
    )
    with pytest.raises(TablesUnavailable, match="late"):
        writer.commit([row(1)], [])


def test_no_transaction_is_open_between_two_pages(pg: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Altering or dropping the source does not wait for the reader of its rows."""
    for bytes_of_one in ("SOON", "MOST"):
        monkeypatch.setattr(f"vllm_tasks.datalayer.spool.{bytes_of_one}", 1)
    db = pg.fill(10_000)
    asked = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
    )
    pages = db.rows(selection(), 10)
    next(pages)
    assert pg.sql(asked) == [(0,)]
    pg.sql("SET lock_timeout = '1s'", "ALTER TABLE t ADD added INTEGER")
    assert sum(map(len, pages)) == 10_000 - 10
    pages = db.rows(selection(), 10)
    next(pages)
    pages.close()
    assert pg.sql(asked) == [(0,)]
    pages = db.rows(selection(), 10)
    next(pages)
    pg.sql("SET lock_timeout = '1s'", "DROP TABLE t")
    with pytest.raises(InvalidCall, match="does not exist"):
        list(pages)


def test_memory_does_not_grow_with_the_table(place: Place) -> None:
    """Rows are streamed: 300,000 of them pass through a few megabytes."""
    db = place.fill(300_000)
    next(db.rows(selection(), 512))
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    assert sum(len(page) for page in db.rows(selection(), 512)) == 300_000
    assert process.memory_info().rss - before < 30 * 2**20
