"""A database: the outputs table and what it holds."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.servers.databases import FLAT, OUT, TABLE, Place, keys, row, selection, sqlite
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable
from vllm_tasks.errors import InvalidCall


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


def test_a_key_of_a_domain_is_read_back_as_the_type_beneath_it(pg: Place) -> None:
    """As a text it would not be found beside the numbers of the source."""
    pg.sql("CREATE DOMAIN positive AS int CHECK (value > 0)", "CREATE TABLE t (id positive, text text)")
    db = pg.open()
    db.writer(selection(), TABLE).commit([row(1)], [])
    assert db.outputs(OUT)["id"].to_pylist() == [1]


def test_no_writer_commits_between_a_check_and_its_write(place: Place) -> None:
    """`before` is called with the lock on the outputs, so what it has seen is still so at the write."""
    db = place.fill()
    first, second = (db.writer(selection(), TABLE) for _ in range(2))
    other = threading.Thread(target=second.commit, args=([row(2)], []))
    seen = []

    def before() -> None:
        other.start()
        other.join(0.5)
        seen.append((other.is_alive(), len(place.outputs())))

    first.commit([row(1)], [], before)
    other.join()
    assert seen == [(True, 0)]
    assert len(place.outputs()) == 2


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


def test_names_that_differ_in_case(place: Place) -> None:
    """They are one column in SQLite, which is refused with the way out, and two in PostgreSQL."""
    place.sql('CREATE TABLE t ("Output" INTEGER PRIMARY KEY, text TEXT)')
    chosen = selection(key=("Output",))
    if place.url.startswith("sqlite"):
        with pytest.raises(InvalidCall, match=r"more than one column 'Output'.*AS another_name"):
            place.open().writer(chosen, TABLE)
    else:
        place.open().writer(chosen, TABLE)


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
