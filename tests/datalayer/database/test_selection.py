"""A database: which rows are selected, by keys of any type."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest

from tests.servers.databases import NOW, OUT, TABLE, Place, every, keys, row, selection
from vllm_tasks.datalayer.selection import SourceRow
from vllm_tasks.errors import InvalidCall


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
        with pytest.raises(InvalidCall, match=r"ids: .*is not a value of the key id"):
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


def test_values_that_python_would_round(pg: Place) -> None:
    """Numbers in JSON keep their digits; an interval with months, which have no length, is a text."""
    pg.sql(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, j JSON, b JSONB, took INTERVAL)",
        "INSERT INTO t VALUES (1, '1.50', '[0.1000000000000000055511, 2.0]', '1 year 2 mons 3 days'), "
        "(2, '{\"a\": 1e5}', '7', '-1 days +02:03')",
    )
    db = pg.open()
    one, other = (r.values for r in every(db, selection(columns=("j", "b", "took"))))
    assert (str(one[0]), list(map(str, one[1]))) == ("1.50", ["0.1000000000000000055511", "2.0"])
    assert one[2] == "1 year 2 mons 3 days"
    assert (str(other[0]["a"]), other[1], other[2]) == ("1e5", 7, dt.timedelta(-1, 7380))


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
