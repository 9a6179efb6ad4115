"""Outputs that other people use: their columns, indexes, grants and wider types stay, and runs resume."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from tests.servers.databases import FLAT, OUT, TABLE, Place, keys, row, selection
from vllm_tasks.errors import InvalidCall


def test_what_others_added_stays(place: Place) -> None:
    """Columns, defaults, indexes and triggers stay, and so does a replaced row's value in such a column."""
    db = place.fill(4)
    db.writer(selection(), TABLE).commit([row(0), row(1)], [])
    place.sql(
        f"ALTER TABLE {OUT} ADD COLUMN reviewed TEXT",
        f"ALTER TABLE {OUT} ADD COLUMN stars INTEGER NOT NULL DEFAULT 3",
        f"CREATE INDEX by_output ON {OUT} (output)",
        f"UPDATE {OUT} SET reviewed = 'yes', stars = 5",
    )
    db.check(selection())
    writer = db.writer(selection(), TABLE)
    assert keys(db, selection()) == [2, 3]
    writer.commit([row(1, output="again"), row(2)], [(1,)])
    assert sorted(place.sql(f"SELECT id, output, reviewed, stars FROM {OUT}")) == [
        (0, "o", "yes", 5),
        (1, "again", "yes", 5),
        (2, "o", None, 3),
    ]
    told = db.outputs(OUT)
    assert told["reviewed"].to_pylist().count("yes") == 2
    assert sorted(told["stars"].to_pylist()) == [3, 5, 5]


def test_a_column_that_no_row_of_ours_fills_is_refused(place: Place) -> None:
    """NOT NULL without a default, and NOT NULL where a failed row has no value: by name."""
    db = place.fill(4)
    db.writer(selection(), TABLE)
    place.sql(f"ALTER TABLE {OUT} ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
    db.writer(selection(), TABLE)
    if not place.sqlite:  # which cannot alter so
        place.sql(f"ALTER TABLE {OUT} ALTER COLUMN owner DROP DEFAULT")
        with pytest.raises(InvalidCall, match="'owner' is NOT NULL without a DEFAULT"):
            db.writer(selection(), TABLE)
        place.sql(f"ALTER TABLE {OUT} DROP COLUMN owner", f"ALTER TABLE {OUT} ALTER output SET NOT NULL")
        with pytest.raises(InvalidCall, match="'output' is NOT NULL"):
            db.writer(selection(), TABLE)
    flat = replace(FLAT, name="_outputs__flat")
    db.writer(selection(), flat)
    with pytest.raises(InvalidCall, match="a column '_position'"):
        db.writer(selection(), replace(TABLE, name=flat.name))


@pytest.mark.parametrize(
    ("narrow", "wide", "new"),
    [
        ("integer", "bigint", str(2**40)),
        ("smallint", "integer", "70000"),
        ("varchar(10)", "text", "'" + "x" * 50 + "'"),
        ("varchar(3)", "varchar(20)", "'abcdefgh'"),
        ("numeric(10, 2)", "numeric(20, 2)", "123456789012.25"),
    ],
)
def test_a_widened_key(pg: Place, narrow: str, wide: str, new: str) -> None:
    """After the source's key was widened, done rows stay done and wide keys fit into the outputs."""
    pg.sql(
        f"CREATE TABLE t (id {narrow} PRIMARY KEY, text TEXT)", "INSERT INTO t VALUES ('1', 'a'), ('2', 'b')"
    )
    db = pg.open()
    found = [r.key for page in db.rows(selection(), 9) for r in page]
    db.writer(selection(), TABLE).commit([row(*found[0])], [])
    pg.sql(f"ALTER TABLE t ALTER id TYPE {wide}", f"INSERT INTO t VALUES ({new}, 'c')")
    db.check(selection())
    writer = db.writer(selection(), TABLE)
    left = [r.key for page in db.rows(selection(), 9) for r in page]
    assert len(left) == 2
    assert found[1] in left
    writer.commit([row(*key) for key in left], [])
    assert keys(db, selection()) == []
    assert len(pg.outputs()) == 3


def test_only_the_needed_grants(pg: Place) -> None:
    """Another owner: who may read the source and read, insert, delete (and update) outputs can run."""
    db = pg.fill(3)
    db.writer(selection(), TABLE).commit([row(0)], [])
    for grants in ("SELECT, INSERT, DELETE", "SELECT, INSERT, UPDATE, DELETE"):
        pg.sql(
            "DO $$ BEGIN CREATE ROLE worker LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
            "GRANT SELECT ON t TO worker",
            f"GRANT {grants} ON {OUT} TO worker",
        )
        worker = Place(pg.url.replace("tests@", "worker@")).open()
        worker.check(selection())
        worker.writer(selection(), TABLE).commit([row(0, output="x"), row(1)], [(0,)])
        assert keys(worker, selection()) == [2]
        worker.close()
    assert pg.outputs() == [(0, "x"), (1, "o")]
    pg.sql("ALTER TABLE t ALTER id TYPE numeric", "ALTER TABLE t ALTER id TYPE bigint")
    pg.sql(f"ALTER TABLE {OUT} ALTER id TYPE integer")
    worker = Place(pg.url.replace("tests@", "worker@")).open()
    with pytest.raises(InvalidCall, match=r"must be owner.*the outputs' owner must run: ALTER TABLE"):
        worker.writer(selection(), TABLE)
    worker.close()


def test_outputs_in_a_schema(pg: Place) -> None:
    """`schema.name` is a table of that schema, or a table of that full name; the schema must exist."""
    pg.sql("CREATE SCHEMA crm")
    db = pg.fill(3)
    for table in (replace(TABLE, name="crm.answers"), replace(FLAT, name="crm.flat")):
        chosen = selection(outputs=table.name)
        db.check(chosen)
        writer = db.writer(chosen, table)
        writer.commit([row(0) | ({"_position": 0} if table.flatten else {})], [])
        assert pg.sql(f"SELECT id FROM {table.name}") == [(0,)]
        assert keys(db, chosen) == [1, 2]
        assert db.has(table.name)
        assert db.outputs(table.name)["id"].to_pylist() == [0]
    db.put("crm.values", pa.table({"k": ["a"], "v": [1]}), ["k"])
    db.put("crm.values", pa.table({"k": ["a"], "v": [2]}), ["k"])
    assert pg.sql("SELECT * FROM crm.values") == [("a", 2)]
    pg.sql('CREATE TABLE "crm.whole" (LIKE crm.answers INCLUDING ALL)')
    assert db.outputs("crm.whole").num_rows == 0
    with pytest.raises(InvalidCall, match="no schema 'crn'"):
        db.check(selection(outputs="crn.answers"))
    dotted = selection(outputs="_outputs__v1.2")
    db.writer(dotted, replace(TABLE, name=dotted.outputs))
    assert pg.sql('SELECT count(*) FROM "_outputs__v1.2"') == [(0,)]
    pg.sql("DROP SCHEMA crm CASCADE")


def test_outputs_altered_or_dropped_under_a_run(place: Place) -> None:
    """An added column is harmless; a missing table is an error that names it."""
    db = place.fill(6)
    writer = db.writer(selection(), TABLE)
    for key in range(3):
        writer.commit([row(key)], [])
        place.sql(f"ALTER TABLE {OUT} ADD COLUMN added{key} TEXT")
        assert keys(db, selection()) == list(range(key + 1, 6))
    place.sql(f"DROP TABLE {OUT}")
    with pytest.raises(InvalidCall, match=rf"{OUT}.*dropped or renamed"):
        writer.commit([row(4)], [])
