"""Complete tables that are written by key: `Tables.read`, `stored`, `has`, `put` in lakes and databases."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import math
import multiprocessing
import random
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from deltalake import DeltaTable

from tests.places import Place
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.lake import delta_writer
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn, OutputTable, Selection, Tables
from vllm_tasks.errors import InvalidCall

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [__name__, "vllm_tasks.datalayer.lake.lake", "vllm_tasks.datalayer.database.database"]
)
SCHEMA = pa.schema(
    {
        "run": pa.string(),
        "row": pa.int64(),
        "score": pa.float64(),
        "passed": pa.bool_(),
        "said": pa.string(),
        "at": pa.timestamp("us", "UTC"),
    }
)
KEY = ("run", "row")
AT = dt.datetime(2026, 11, 22, 12, 0, 0, 1, tzinfo=dt.UTC)


def score(run: str, row: int, **changed: Any) -> dict[str, Any]:
    return {"run": run, "row": row, "score": 0.5, "passed": True, "said": "x", "at": AT} | changed


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SCHEMA)


@pytest.fixture
def tables(place: Place) -> Iterator[Tables]:
    place.fill_texts("a", "b", None)
    opened = place.db.tables()
    yield opened
    opened.close()


def everything(tables: Tables, select: str, *columns: str) -> list[dict[str, Any]]:
    return [dict(row) for page in tables.read(select, columns or None) for row in page]


def stored(tables: Tables, name: str = "scores") -> list[dict[str, Any]]:
    """The rows with their types, by key."""
    rows: list[dict[str, Any]] = tables.outputs(name).to_pylist()
    return sorted(rows, key=lambda row: (row["run"], row["row"]))


# ---------------------------------------------------------------------- reading


def test_read_gives_rows_of_tables_and_selects(tables: Tables) -> None:
    """`read` returns all columns or those named, of a table or a SELECT."""
    assert sorted(everything(tables, "rows"), key=lambda r: r["id"]) == [
        {"id": 0, "text": "a"},
        {"id": 1, "text": "b"},
        {"id": 2, "text": None},
    ]
    assert sorted(r["text"] or "" for r in everything(tables, "rows", "text")) == ["", "a", "b"]
    assert everything(tables, "SELECT id + 1 AS n FROM rows WHERE text = 'b'") == [{"n": 2}]
    assert everything(tables, "SELECT * FROM rows WHERE id > 9") == []


def test_read_streams_in_pages(place: Place) -> None:
    """No list is longer than 1,000 rows, and none is lost between two lists."""
    place.fill_texts(*map(str, range(2500)))
    with closing(place.db.tables()) as tables:
        pages = list(tables.read("rows", ["id"]))
    assert max(map(len, pages)) <= 1000
    assert sorted(row["id"] for page in pages for row in page) == list(range(2500))


@pytest.mark.parametrize(
    ("select", "columns", "words"),
    [
        ("row", None, "rows"),
        ("rows", ["id", "txt"], "has no column 'txt'; did you mean 'text'"),
        ("SELECT id, text AS id FROM rows", None, "two columns 'id'|more than one column 'id'"),
        ("SELECT id FROM rows; SELECT id FROM rows", None, "one SELECT"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tables: Tables, select: str, columns: list[str] | None, words: str
) -> None:
    """A source or a column that is not there, and a name that two columns have."""
    with pytest.raises(InvalidCall, match=words):
        list(tables.read(select, columns))


def test_a_name_that_two_columns_have_harms_nobody_who_wants_another(tables: Tables) -> None:
    """Only the columns that are read need unique names."""
    select = "SELECT a.id, b.id, a.text FROM rows a JOIN rows b ON a.id = b.id WHERE a.id = 0"
    assert everything(tables, select, "text") == [{"text": "a"}]


TYPES = {"ok": "BOOLEAN", "at": "TIMESTAMP", "day": "DATE", "data": "JSON"}
NOON = dt.datetime(2026, 11, 22, 12, 0, 0, 1)
TYPED: list[dict[str, Any]] = [
    {"id": 0, "ok": True, "at": NOON, "day": NOON.date(), "data": [1, None]},
    {"id": 1, "ok": False, "at": NOON.replace(microsecond=0), "day": dt.date.min, "data": []},
    {"id": 2, "ok": None, "at": None, "day": None, "data": None},
]


def run(place: Place, *statements: str) -> None:
    engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def sql(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "NULL", True: "TRUE", False: "FALSE"}[value]
    return f"'{json.dumps(value) if isinstance(value, list) else value}'" if value != 0 else "0"


def test_a_table_has_the_same_values_wherever_it_is(place: Place) -> None:
    """SQLite has numbers for booleans, and text for times and JSON; the table declares the types."""
    if "://" in place.url:
        columns = ", ".join(f'"{name}" {kind}' for name, kind in TYPES.items())
        rows = ", ".join(f"({row['id']}, {', '.join(sql(row[name]) for name in TYPES)})" for row in TYPED)
        run(
            place,
            f"CREATE TABLE typed (id INTEGER, {columns})",
            f"INSERT INTO typed VALUES {rows}",
            "CREATE VIEW seen AS SELECT * FROM typed",
        )
    else:
        Path(place.url).mkdir()
        for name in "typed", "seen":
            pq.write_table(pa.Table.from_pylist(TYPED), Path(place.url) / f"{name}.parquet")
    with closing(place.db.tables()) as tables:
        for name in "typed", "seen":
            found = sorted(everything(tables, name), key=lambda row: row["id"])
            assert list(map(repr, found)) == list(map(repr, TYPED))
        some = everything(tables, "typed", "ok", "id")
        assert sorted(some, key=lambda row: row["id"])[1] == {"ok": False, "id": 1}


def test_what_is_no_value_of_its_columns_type_stays_as_it_is(tmp_path: Path) -> None:
    """SQLite holds anything in any column."""
    odd = ["", "x", 5, -1.5, b"\xff", 2**62, "NaN", "[" * 100_000]
    with closing(sqlite3.connect(tmp_path / "t.db")) as connection:
        columns = ", ".join(f'"{name}" {kind}' for name, kind in TYPES.items())
        connection.execute(f"CREATE TABLE t ({columns}, more, late DATETIME(6), yes BOOL)")
        rows = [(value,) * 4 + ("2026-11-22", "2026-11-22T12:00+01:00", 1) for value in odd]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        connection.commit()
    late = dt.datetime(2026, 11, 22, 12, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    with closing(Datalayer(url=f"sqlite:///{tmp_path}/t.db").tables()) as tables:
        assert [tuple(row.values()) for row in everything(tables, "main.t")] == [
            (value,) * 4 + ("2026-11-22", late, True) for value in odd
        ]


def test_outputs_are_read_by_name(tables: Tables) -> None:
    """An outputs table is a source as any other, its JSON as text by a CAST; what was written after a
    first read is seen by the next one."""
    name = "_outputs__validation-x"
    own = dict.fromkeys(OWN_COLUMNS) | {"_fingerprint": "f", "_created_at": AT}
    selection = Selection("rows", ("id",), ("text",), name, "f")
    writer = tables.writer(selection, OutputTable(name, (OutputColumn("output", "json"),)))
    assert everything(tables, name) == []
    select = f'SELECT "id", CAST("output" AS VARCHAR) AS said FROM "{name}" WHERE "id" = 1'
    assert everything(tables, select) == []
    writer.commit([{"id": 1, "output": {"n": [1, "ü"]}} | own], ())
    writer.close()
    assert everything(tables, select) == [{"id": 1, "said": '{"n": [1, "ü"]}'}]
    assert tables.stored(name, 'CAST("output" AS VARCHAR) AS said', '"id" = 1') == [
        {"said": '{"n": [1, "ü"]}'}
    ]
    assert [row["id"] for row in everything(tables, name)] == [1]


def test_stored_gives_rows_of_tables_that_were_put(tables: Tables) -> None:
    """Columns of the rows that satisfy a condition, as they are now; none of a table that is not there."""
    assert tables.stored("scores", "*", "1 = 1") == []
    tables.put("scores", table(), KEY)
    assert tables.stored("scores", "*", "1 = 1") == []
    tables.put("scores", table(score("a", 1), score("a", 2, said=None), score("it's", 1)), KEY)
    found = tables.stored("scores", '"row", said', "run = 'a'")
    assert sorted(found, key=lambda row: row["row"]) == [{"row": 1, "said": "x"}, {"row": 2, "said": None}]
    tables.put("scores", table(score("a", 2, said="y")), KEY)
    assert tables.stored("scores", "said", "run = 'a' AND \"row\" = 2") == [{"said": "y"}]
    assert tables.stored("scores", "count(*) AS n", "run = 'it''s'") == [{"n": 1}]


def test_a_table_is_there_or_not(tables: Tables) -> None:
    """Sources and tables that were put are there; others, and parts of their names, are not."""
    assert tables.has("rows")
    assert not tables.has("scores")
    tables.put("scores", table(), KEY)
    assert tables.has("scores")
    assert everything(tables, "scores") == []
    for other in ("", "score", "SELECT 1", "rows;", "no/such", "a\ud800", "a\0"):
        assert not tables.has(other)


def test_a_lake_that_is_not_there_has_no_table_and_is_made(tmp_path: Path) -> None:
    """A query creates nothing; a folder without data files is no table, but may become one."""
    with closing(Lake(str(tmp_path / "new" / "lake"))) as lake:
        assert not lake.has("scores")
        assert not (tmp_path / "new").exists()
        lake.put("scores", table(score("a", 1)), KEY)
        assert lake.has("scores")
        (tmp_path / "new" / "lake" / "empty" / "_delta_log").mkdir(parents=True)
        assert not lake.has("empty")
        lake.put("empty", table(score("a", 1)), KEY)
        assert lake.has("empty")


# ---------------------------------------------------------------------- putting


def test_put_replaces_by_key(tables: Tables) -> None:
    """New keys are added, those there are replaced, the others stay; a repetition changes nothing."""
    tables.put("scores", table(score("a", 1), score("a", 2)), KEY)
    second = table(score("a", 2, score=None, passed=False), score("b", 1, said=None, at=None, passed=None))
    for _ in range(2):
        tables.put("scores", second, KEY)
        assert stored(tables) == [
            score("a", 1),
            score("a", 2, score=None, passed=False),
            score("b", 1, said=None, at=None, passed=None),
        ]
    assert everything(tables, """SELECT "row" FROM "scores" WHERE "run" = 'b'""") == [{"row": 1}]
    twice = (
        """SELECT count(*) AS n FROM "scores" a JOIN "scores" b ON a."run" = b."run" WHERE b."said" = 'x'"""
    )
    assert everything(tables, twice) == [{"n": 4}]


def test_types_and_floats_come_back_as_they_went(tables: Tables) -> None:
    """Each of the five types is itself again, and a float has the same bits."""
    floats = [0.1, 1 / 3, -1.5e300, 5e-324, 2.0, 1e17, math.inf, -math.inf, math.nextafter(1, 2)]
    floats += [struct.unpack("d", random.Random(0).randbytes(8))[0] for _ in range(50)]
    floats = [f for f in floats if f == f]
    rows = [score("a", i, score=f, said=f"ü '{i}'\n\"") for i, f in enumerate(floats)]
    tables.put("scores", table(*rows), KEY)
    assert tables.outputs("scores").schema.remove_metadata().equals(SCHEMA)
    assert stored(tables) == rows
    again = sorted(everything(tables, "scores"), key=lambda row: row["row"])
    assert again == rows
    assert all(row["passed"] is True and row["at"].utcoffset() == dt.timedelta() for row in again)
    read = {row["row"]: row["score"] for row in everything(tables, "scores", "row", "score")}
    assert [struct.pack("d", read[i]) for i in range(len(floats))] == [struct.pack("d", f) for f in floats]


@pytest.mark.parametrize("kind", ["int64", "bool", "string", "timestamp"])
def test_any_type_but_float_is_a_key(tables: Tables, kind: str) -> None:
    """Keys of each type stay distinct and are found again."""
    values = {"int64": [-(2**63), 0, 2**63 - 1], "bool": [False, True], "string": ["", "a", "A", "a "]}
    times = [AT, AT + dt.timedelta(microseconds=1), AT + dt.timedelta(milliseconds=1)]
    kinds = {"timestamp": pa.timestamp("us", "UTC"), "bool": pa.bool_(), "int64": pa.int64()}
    keys = values.get(kind, times)
    for n in range(3):
        new = {"k": pa.array(keys, kinds.get(kind, pa.string())), "n": pa.array([n] * len(keys), pa.int64())}
        tables.put("t", pa.table(new), ["k"])
    found = tables.outputs("t").to_pylist()
    assert sorted(row["k"] for row in found) == sorted(keys)
    assert {row["n"] for row in found} == {2}


@pytest.mark.parametrize("name", ["it's", "a b-c.d", "Größe (ü)", "select", "x;--", "A{b}=$1&c,~", "über:%d"])
def test_names_with_odd_characters(tables: Tables, name: str) -> None:
    """Tables and columns may be named so, in one SELECT too."""
    nulls = pa.nulls(1, pa.bool_())
    new = pa.table({f'k"{name}': ["a"], f"{name} n": [1], "a:b": [1.5], "%s": nulls})
    for _ in range(2):
        tables.put(name, new, [f'k"{name}'])
    assert tables.has(name)
    assert everything(tables, name) == new.to_pylist()
    assert everything(tables, f'SELECT "a:b" FROM "{name}"') == [{"a:b": 1.5}]
    assert everything(tables, name, f'k"{name}') == [{f'k"{name}': "a"}]


def test_columns_in_another_order_are_the_same_table(tables: Tables) -> None:
    """Columns are known by name."""
    tables.put("scores", table(score("a", 1)), KEY)
    turned = table(score("a", 1, score=1.0), score("a", 2)).select(SCHEMA.names[::-1])
    tables.put("scores", turned, KEY[::-1])
    assert stored(tables) == [score("a", 1, score=1.0), score("a", 2)]


def test_another_shape_is_refused(tables: Tables) -> None:
    """The error names the difference and the way out, and the existing table stays."""
    tables.put("scores", table(score("a", 1)), KEY)
    one = table(score("a", 2))
    for other, words in (
        (one.drop_columns("said"), "'said'"),
        (one.append_column("more", pa.array([1])), "'more'"),
        (one.set_column(2, "score", pa.array([1])), "'score' is .*, (not|would be) (int|BIG|big)"),
    ):
        with pytest.raises(InvalidCall, match=rf"another shape.*{words}.*; name another table"):
            tables.put("scores", other, KEY)
    assert stored(tables) == [score("a", 1)]


@pytest.mark.parametrize(
    ("rows", "key", "words"),
    [
        ({"a": pa.array([1], pa.int32())}, ["a"], "'a' is of type int32; cast it"),
        ({"a": [1], "t": pa.array([AT], pa.timestamp("us"))}, ["a"], "'t' is of type timestamp"),
        ({"a": [1.5]}, ["a"], "floating-point"),
        ({"a": [1]}, ["b"], "key"),
        ({"a": [1]}, [], "key"),
        ({"a": [1, None]}, ["a"], "'a' is NULL in 1 rows"),
        ({"a": [1, 2, 1]}, ["a"], "1 keys occur in several rows, for example {'a': 1}"),
        ({"a": [1], "A": [1]}, ["a"], "two columns are named"),
        ({"a": [1], "": [1]}, ["a"], "'' cannot name"),
    ],
)
def test_rows_that_cannot_be_put_are_refused(
    tables: Tables, rows: dict[str, Any], key: list[str], words: str
) -> None:
    """The error gives the reason before anything is created."""
    with pytest.raises(InvalidCall, match=words):
        tables.put("t", pa.table(rows), key)
    assert not tables.has("t")


def test_what_postgresql_cannot_hold_is_refused(postgres: Any) -> None:
    """Text with the character 0, and a name that it would truncate, are refused."""
    with closing(Datalayer(url=postgres.new_database()).tables()) as tables:
        with pytest.raises(InvalidCall, match="column 'said': the character 0"):
            tables.put("scores", table(score("a", 1), score("a", 2, said="\0")), KEY)
        with pytest.raises(InvalidCall, match="63 bytes"):
            tables.put("ü" * 40, table(score("a", 1)), KEY)
        assert not tables.has("scores")


# ---------------------------------------------------------------------- rivals and kills


def test_rivals_lose_nothing(place: Place, tables: Tables) -> None:
    """Two concurrent puts, on one object or two, with own and common keys, lose nothing: all keys are
    there once, and each common key is completely from one put.
    """
    errors: list[BaseException] = []

    def rival(mine: Tables, run: str) -> None:
        try:
            for i in range(6):
                mine.put("scores", table(score(run, i), *(score("both", k, said=run) for k in range(5))), KEY)
        except BaseException as e:
            errors.append(e)
            raise

    with closing(place.db.tables()) as other:
        threads = [
            threading.Thread(target=rival, args=(mine, run))
            for mine, run in ((tables, "a"), (tables, "b"), (other, "c"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    rows = stored(tables)
    expected = [*((run, i) for run in "ab" for i in range(6)), *(("both", k) for k in range(5))]
    assert [(row["run"], row["row"]) for row in rows] == expected + [("c", i) for i in range(6)]
    assert len({row["said"] for row in rows if row["run"] == "both"}) == 1


def put_for_ever(url: str, first: int, started: Any) -> None:
    """Put all rows of `run` for ever, with another number each time."""
    tables = Datalayer(url=url).tables()
    started.set()
    for n in itertools.count(first):
        tables.put("scores", table(*(score("a", i, score=float(n)) for i in range(200))), KEY)


def test_killed_in_the_middle_a_put_leaves_none_or_all(place: Place, tables: Tables) -> None:
    """Whenever the process is killed, the rows are those of one put; and the next put goes through."""
    for kill in range(6):
        started = PROCESSES.Event()
        job = PROCESSES.Process(target=put_for_ever, args=(place.url, 1000 * kill, started))
        job.start()
        assert started.wait(60)
        time.sleep(random.uniform(0, 0.25))
        job.kill()
        job.join()
        job.close()
        found = everything(tables, "scores") if tables.has("scores") else []
        assert len(found) in (0, 200)
        assert len({row["score"] for row in found}) <= 1
    tables.put("scores", table(score("a", 0)), KEY)
    assert stored(tables)[0] == score("a", 0)


def test_many_small_puts_leave_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lake's files do not grow in number with the puts."""
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 5)
    with closing(Lake(str(tmp_path))) as lake:
        for i in range(23):
            lake.put("scores", table(score("a", i)), KEY)
        assert [row["row"] for row in stored(lake)] == list(range(23))
    assert len(DeltaTable(str(tmp_path / "scores")).file_uris()) < 10


def test_a_full_sqlite_transaction_is_one(tmp_path: Path) -> None:
    """A put whose rows cannot all be inserted makes no table either."""
    sqlite3.connect(tmp_path / "t.db").close()
    with closing(Datalayer(url=f"sqlite:///{tmp_path}/t.db").tables()) as tables:
        with pytest.raises(InvalidCall, match="NaN"):
            tables.put("scores", table(score("a", 1), score("a", 2, score=math.nan)), KEY)
        assert not tables.has("scores")
