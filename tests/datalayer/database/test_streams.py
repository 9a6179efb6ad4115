"""A database is read and counted while it is written, in bounded memory."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.servers.databases import OUT, TABLE, Place, every, row, selection, sqlite
from vllm_tasks.errors import InvalidCall, TablesUnavailable


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
        writer.commit([row(*r.key) for r in page], [])
        place.sql("UPDATE t SET text = 'changed'", "DELETE FROM t WHERE id = 99")
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
        with pytest.raises(TablesUnavailable, match="journal_mode"):
            db.count(slow)
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
