"""A database is read in short transactions, in the order of its keys of any type."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from tests.servers.databases import TABLE, Place, every, keys, row, selection, sqlite
from tests.servers.postgres import Postgres

KEYS: dict[str, list[Any]] = {
    "bigint": [-(2**63), -1, 0, 1, 2**63 - 1],
    "numeric": ["-Infinity", "-1.50", "0", "1E+30", "1e-30", "Infinity", "NaN"],
    "text": ["", " ", "a", "A", "ä", "z", "Z", "a b", "a'b", "a\\b", "%", "数", "a" * 3000],
    'text COLLATE "C"': ["", "a", "A", "ä", "Z", "b"],
    'text COLLATE "und-x-icu"': ["a", "A", "ä", "b", "B"],
    'text COLLATE "ignoring case"': ["a", "B", "c", "D"],
    "citext": ["a", "B", "c", "D", "_"],
    "char(4)": ["", "a", "ab", "abcd"],
    '"char"': ["a", "b"],
    "name": ["a", "b"],
    "uuid": [f"{i:08x}-0b1d-4b9a-8f1e-2f7f6a1c0d3e" for i in (0, 1, 2**31, 2**32 - 1)],
    "bytea": ["\\x", "\\x00", "\\x00ff", "\\xff", "\\x5c"],
    "boolean": ["false", "true"],
    "date": ["-infinity", "0044-03-15 BC", "2026-11-22", "294276-01-01", "infinity"],
    "timestamp": ["-infinity", "0044-03-15 BC", "2026-11-22 01:02:03.000004", "infinity"],
    "timestamptz": ["-infinity", "2026-11-22 01:02:03.000004+05:30", "2026-11-22 01:02Z", "infinity"],
    "time": ["00:00", "01:02:03.000004", "24:00"],
    "timetz": ["00:00+02", "00:00-02", "01:02:03.000004+05:30", "12:00+00:00:01", "24:00+00"],
    "int4range": ["empty", "[1,5)", "(,3)", "[7,)"],
    "daterange": ["[2026-01-01,2026-02-01)", "(,2026-01-01)"],
    "inet": ["10.0.0.1", "10.0.0.0/8", "::1"],
    "macaddr": ["08:00:2b:01:02:03", "08:00:2b:01:02:04"],
    "bit(3)": ["001", "111"],
    "mood": ["sad", "happy"],
    "code": ["a", "B"],
    "money": ["-1.50", "0", "92233720368547758.07"],
}


@pytest.mark.parametrize("kind", KEYS)
def test_each_key_is_read_once_however_often_reading_begins_anew(
    pg: Place,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A row a transaction, forwards through every type of key; and committed keys are found again."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.FIRST", 1)
    pg.sql(
        "CREATE EXTENSION IF NOT EXISTS citext",
        'CREATE COLLATION "ignoring case" '
        "(provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        "CREATE TYPE mood AS ENUM ('sad', 'happy')",
        'CREATE DOMAIN code AS text COLLATE "C"',
        f"CREATE TABLE t (id {kind} PRIMARY KEY, text text)",
        "CREATE VIEW v AS SELECT * FROM t",
        *("INSERT INTO t VALUES ('" + str(key).replace("'", "''") + "', 'x')" for key in KEYS[kind]),
    )
    for i, select in enumerate(("t", "v", "SELECT text, id FROM t")):
        db = pg.open()
        chosen = selection(select, outputs=f"_outputs__{i}")
        db.check(chosen)
        writer = db.writer(chosen, TABLE.__class__(chosen.outputs, TABLE.columns))
        found = [r.key for page in db.rows(chosen, 1) for r in page]
        assert len(found) == len(set(map(repr, found))) == len(KEYS[kind])
        writer.commit([row(*key) for key in found[::2]], [])
        left = [r.key for page in db.rows(chosen, 1) for r in page]
        assert list(map(repr, left)) == list(map(repr, found[1::2]))
        assert db.count(chosen) == (len(found), len(left))


@pytest.mark.parametrize("select", ["t", "SELECT * FROM t"])
def test_composite_keys_are_read_in_the_order_of_their_index(
    pg: Place,
    monkeypatch: pytest.MonkeyPatch,
    select: str,
) -> None:
    """Columns of two collations, in another order in the index than in the key; also in shards."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.FIRST", 2)
    pg.sql(
        'CREATE TABLE t (a text COLLATE "C", b text COLLATE "und-x-icu", n int, text text, '
        "PRIMARY KEY (n, b, a))",
        "INSERT INTO t SELECT a, b, n, a || b || n FROM unnest('{a,A,b,B}'::text[]) a, "
        "unnest('{a,A,b,B}'::text[]) b, generate_series(1, 4) n",
    )
    db = pg.open()
    chosen = selection(select, key=("a", "b", "n"))
    db.check(chosen)
    writer = db.writer(chosen, TABLE)
    found = every(db, chosen)
    assert len({r.key for r in found}) == 64
    assert all("".join(map(str, r.key)) == r.values[0] for r in found)
    parts = [every(db, selection(select, key=chosen.key, shard=(i, 3))) for i in range(3)]
    assert sorted(map(len, parts))[0] > 0
    assert sum(map(len, parts)) == 64
    some = selection(select, key=chosen.key, ids=(found[0].key, found[9].key))
    assert [r.key for r in every(db, some)] == [found[0].key, found[9].key]
    writer.commit([row(*r.key, names=chosen.key) for r in found[:60]], [])
    assert keys(db, chosen) == [r.key for r in found[60:]]


@pytest.mark.parametrize("refresh", ["missing", "changed", "all"])
def test_rows_are_read_once_while_they_are_committed(
    pg: Place,
    monkeypatch: pytest.MonkeyPatch,
    refresh: Any,
) -> None:
    """Each page starts a new read, between commits of its rows: no row is missed or read twice."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    db = pg.fill(500)
    chosen = selection(refresh=refresh)
    writer = db.writer(chosen, TABLE)
    writer.commit([row(i, _fingerprint="old" if i % 2 else "f") for i in range(0, 300)], [])
    seen = []
    for page in db.rows(chosen, 16):
        writer.commit([row(*r.key) for r in page], [])
        seen += [r.key[0] for r in page]
    expected = range(500) if refresh != "missing" else [*range(1, 300, 2), *range(300, 500)]
    assert seen == list(expected)


def test_wide_rows_are_few_at_a_time(pg: Place) -> None:
    """Pages are bounded in bytes: rows of a megabyte do not come by hundreds."""
    pg.sql(
        "CREATE TABLE t (id int PRIMARY KEY, text text)",
        "INSERT INTO t SELECT g, repeat(md5(g::text), 32768) FROM generate_series(1, 60) g",
    )
    sizes = [len(page) for page in pg.open().rows(selection(), 512)]
    assert sum(sizes) == 60
    assert max(sizes) <= 16


def test_a_slow_select_is_not_sorted_anew_for_each_few_rows(
    pg: Place,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A query that is slow to its first row is read for as long again in the same transaction."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.LEAST", 1)
    pg.sql(
        "CREATE TABLE t (id int, text text)",
        "INSERT INTO t SELECT g, 'x' FROM generate_series(1, 5000) g",
        "CREATE FUNCTION slow() RETURNS int LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE LOG 'read anew'; PERFORM pg_sleep(0.5); RETURN 1; END $$",
        "CREATE VIEW v AS SELECT t.* FROM t, (SELECT slow()) s",
    )
    before = postgres.log.read_text().count("read anew")
    assert len(every(pg.open(), selection("v"), 100)) == 5000
    assert 0 < postgres.log.read_text().count("read anew") - before < 10


NAMES = ["n", "c0", "c1", "v0", "i0", "redo", "input_hash", "value", "rows", "key", "count", "s", "o", "one"]
NAMES += ["twice", "after", "last", "b0", "_rows", "_key0", "_after0", "excluded", "select", "rowid", "oid"]


@pytest.mark.parametrize("unique", ["", "UNIQUE"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_happen_to_be_taken(place: Place, name: str, unique: str) -> None:
    """Columns may have any name, even one that our own statements use."""
    if not place.sqlite and name in ("oid", "rowid"):
        name += "s"
    place.sql(
        f'CREATE TABLE t ("{name}" integer NOT NULL {unique}, "x{name}" text)',
        "INSERT INTO t VALUES (1, 'a'), (2, 'b')",
    )
    for select in ("t", "SELECT * FROM t"):
        db = place.open()
        chosen = selection(
            select, key=(name,), columns=(f"x{name}", name), outputs=f"_outputs__{len(select)}"
        )
        db.check(chosen)
        writer = db.writer(chosen, TABLE.__class__(chosen.outputs, TABLE.columns))
        writer.commit([row(1, names=(name,))], [])
        writer.commit([row(1, names=(name,))], [(1,)])
        (found,) = every(db, chosen)
        assert (found.key, found.values) == ((2,), ("b", 2))
        assert db.count(chosen) == (2, 1)
        ids = selection(select, key=(name,), columns=(), outputs=chosen.outputs, ids=((2,),))
        assert keys(db, ids) == [2]
        assert db.outputs(chosen.outputs)[name].to_pylist() == [1]


@pytest.mark.parametrize("collation", ["NOCASE", "RTRIM", "BINARY"])
@pytest.mark.parametrize("unique", ["", "UNIQUE"])
def test_sqlite_keys_of_other_collations(tmp_path: Path, collation: str, unique: str) -> None:
    """Keys that differ in the source differ in the outputs, and each key is done once."""
    place = sqlite(tmp_path)
    place.sql(
        f"CREATE TABLE t (id TEXT COLLATE {collation} NOT NULL {unique}, text TEXT)",
        "INSERT INTO t VALUES ('a', '1'), ('B', '2'), ('c  ', '3'), ('D', '4')",
    )
    db = place.open()
    db.check(selection())
    writer = db.writer(selection(), TABLE)
    assert keys(db, selection()) == ["B", "D", "a", "c  "]
    writer.commit([row("a"), row("c  ")], [])
    assert keys(db, selection()) == ["B", "D"]
    writer.commit([row("a"), row("B")], [("a",)])
    assert keys(db, selection(refresh="all")) == ["B", "D", "a", "c  "]
    assert len(place.outputs()) == 3
    db.close()


def test_sqlite_keys_that_only_their_index_tells_apart(tmp_path: Path) -> None:
    """A unique index with another collation than the column's does not make the column's keys unique."""
    place = sqlite(tmp_path)
    place.sql(
        "CREATE TABLE t (id TEXT COLLATE NOCASE NOT NULL, text TEXT)",
        "CREATE UNIQUE INDEX i ON t (id COLLATE BINARY)",
        "INSERT INTO t VALUES ('a', '1'), ('A', '2'), ('b', '3')",
    )
    db = place.open()
    found = [r for page in db.rows(selection(), 10) for r in page]
    assert sorted((r.key[0], r.values[0]) for r in found) == [("A", "2"), ("a", "1"), ("b", "3")]
    db.close()


def test_a_declared_time_keeps_all_its_digits(tmp_path: Path) -> None:
    """Python has microseconds; a finer time stays the text that SQLite has."""
    place = sqlite(tmp_path)
    texts = ("2024-01-02 03:04:05.123456789", "2024-01-02T03:04:05.1234567Z")
    place.sql("CREATE TABLE t (id integer PRIMARY KEY, at DATETIME, stamp TIMESTAMP)")
    place.sql(f"INSERT INTO t VALUES (1, '{texts[0]}', '{texts[1]}')")
    db = place.open()
    (found,) = every(db, selection(columns=("at", "stamp")))
    assert found.values == texts
    db.close()


def test_declared_types_are_the_same_for_rows_and_read(tmp_path: Path) -> None:
    """One value path: a BOOLEAN, a DATE or JSON of SQLite's is the same Python value either way."""
    place = sqlite(tmp_path)
    place.sql(
        "CREATE TABLE t (id integer PRIMARY KEY, b BOOLEAN, d DATE, at DATETIME, j JSON, n NUMERIC(10, 2))",
        """INSERT INTO t VALUES (1, 1, '2024-01-02', '2024-01-02 03:04:05', '{"b": [1.5]}', 1.5)""",
    )
    place.sql("CREATE VIEW v AS SELECT * FROM t")
    db = place.open()
    columns = ("b", "d", "at", "j", "n")
    wanted = (True, dt.date(2024, 1, 2), dt.datetime(2024, 1, 2, 3, 4, 5), {"b": [1.5]}, 1.5)
    for select in ("t", "v"):
        (found,) = every(db, selection(select, columns=columns))
        assert found.values == wanted
        assert type(found.values[0]) is bool
        ((read,),) = db.read(select, columns)
        assert tuple(read.values()) == wanted
    db.close()


def test_ranges_and_addresses_are_texts(pg: Place) -> None:
    """No other source has such types, so that a validation could not keep them."""
    wanted = {
        "int4range": "[1,5)",
        "numrange": "(,1.50]",
        "tstzrange": '["2024-01-01 00:00:00+00",)',
        "int4multirange": "{[1,2)}",
        "inet": "10.0.0.1/8",
        "cidr": "10.0.0.0/8",
        "inet[]": ["10.0.0.1"],
    }
    columns = ", ".join(f'"{kind}" {kind}' for kind in wanted)
    pg.sql(f"CREATE TABLE t (id int PRIMARY KEY, {columns})")
    values = ", ".join(
        f"'{value}'" if isinstance(value, str) else "'{10.0.0.1}'" for value in wanted.values()
    )
    pg.sql(f"INSERT INTO t VALUES (1, {values})")
    ((found,),) = pg.open().read("t", list(wanted))
    assert found == wanted


def test_arrays_of_any_type_are_lists(pg: Place) -> None:
    """Those of enums, domains and extensions as those of texts; of a domain, with the values beneath it."""
    pg.sql(
        "CREATE EXTENSION IF NOT EXISTS citext",
        "CREATE TYPE mood AS ENUM ('sad', 'happy')",
        "CREATE TYPE point2 AS (x int, note text)",
        "CREATE DOMAIN positive AS int CHECK (value > 0)",
        "CREATE DOMAIN small AS positive CHECK (value < 9)",
        "CREATE TABLE t (m mood[], mm mood[], s small[], c citext[], p point2[], r point2)",
        """INSERT INTO t
        VALUES ('{happy,NULL}', '{{sad},{happy}}', '{1,2}', '{"A,b"}', '{"(1,a)"}', '(1,a)')""",
    )
    ((found,),) = pg.open().read("t", ["m", "mm", "s", "c", "p", "r"])
    assert [*found.values()] == [["happy", None], [["sad"], ["happy"]], [1, 2], ["A,b"], ["(1,a)"], "(1,a)"]
