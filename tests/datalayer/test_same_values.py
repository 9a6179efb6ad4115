"""A table by its name and a SELECT over it give the same values; where they cannot, the SELECT is refused."""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Datalayer, InvalidCall, VllmAPI
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.duckdb_file import DuckDBSource

SECONDS = pa.duration("s")
WIDE = pa.decimal256(50, 2)
HALF = np.float16(0.1)


def written(path: Path, columns: dict[str, Any], kind: str = "parquet", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if kind == "parquet":
        pq.write_table(table, path.with_suffix(".parquet"), **options)
    else:
        with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as writer:
            writer.write_table(table)


def rows(url: Any, select: str, columns: Sequence[str] = ("id", "x")) -> list[tuple[Any, ...]]:
    with closing(Datalayer(url=str(url)).tables()) as tables:
        found = [tuple(row.values()) for page in tables.read(select, columns) for row in page]
    return sorted(found, key=repr)


def test_unions_are_refused_in_a_select(tmp_path: Path) -> None:
    """DuckDB has no text for them but their own, and no decimals of a negative scale."""
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["x"])])
    for name, column in (("u", union), ("d", pa.array([Decimal(1200)], pa.decimal128(5, -2)))):
        written(tmp_path / name, {"id": [1], "x": column}, "arrow")
        assert rows(tmp_path, name) == [(1, 1 if name == "u" else 1200)]
        with pytest.raises(InvalidCall, match="which SQL would change; name the table itself"):
            rows(tmp_path, f"SELECT * FROM {name}")


VARIANTS = (
    "SELECT 1 AS id, 42::VARIANT AS x UNION ALL SELECT 2, 'b'::VARIANT UNION ALL SELECT 3, {'a': 1}::VARIANT"
)


def test_variants_are_json(tmp_path: Path) -> None:
    """Arrow would have the bytes of their encoding: a table of Parquet that is named is refused."""
    duckdb.sql(VARIANTS).write_parquet(f"{tmp_path}/t.parquet")
    with pytest.raises(InvalidCall, match=r"'x' of .* VARIANT.*; read it as JSON, with a SELECT"):
        rows(tmp_path, "t")
    wanted = [(1, 42), (2, "b"), (3, {"a": 1})]
    assert rows(tmp_path, "SELECT * FROM t") == wanted
    assert rows(tmp_path, "t", ("id",)) == [(1,), (2,), (3,)]
    with closing(duckdb.connect(str(tmp_path / "x.duckdb"))) as db:
        db.execute(f"CREATE TABLE v AS {VARIANTS}")
    with closing(DuckDBSource(f"duckdb:///{tmp_path}/x.duckdb", "v")) as source:
        found = [
            row
            for part in source.parts(pa.schema([("id", pa.int64())]), ("id", "x"), Unreadable())
            for page in part.values(range(part.count))
            for row in page
        ]
    assert sorted(found, key=repr) == wanted


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([HALF], pa.float16()),
        ([[HALF]], pa.list_(pa.float16())),
        ([{"a": HALF}], pa.struct([("a", pa.float16())])),
        ([[("a", HALF)]], pa.map_(pa.string(), pa.float16())),
        ([Decimal("1" * 45)], WIDE),
        ([dt.timedelta(seconds=1)], SECONDS),
        ([[dt.timedelta(seconds=1)]], pa.list_(SECONDS)),
    ],
)
def test_what_sql_would_change_is_refused(tmp_path: Path, kind: str, values: Any, type_: pa.DataType) -> None:
    """The refusal names the column, and comes only if the column is used."""
    written(tmp_path / "t", {"id": [1], "x": pa.array(values, type_), "y": ["a"]}, kind)
    assert len(rows(tmp_path, "t")) == 1
    for select in ("SELECT * FROM t", "SELECT id, CAST(x AS VARCHAR) AS x FROM t"):
        with pytest.raises(InvalidCall, match=r"column 'x' of .* SQL would change; name the table itself"):
            rows(tmp_path, select)
    assert rows(tmp_path, "SELECT * FROM t WHERE y = 'a'", ("id", "y")) == [(1, "a")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_all_other_types_are_the_same(tmp_path: Path, kind: str) -> None:
    """Each type with a value that another one would lose."""
    at = 1_700_000_000_123_456_789
    columns = {
        "ns": pa.array([at], pa.timestamp("ns")),
        "zoned": pa.array([at // 1000], pa.timestamp("us", "Europe/Berlin")),
        "time": pa.array([3_600_001], pa.time64("ns")),
        "wide": pa.array([2**64 - 1], pa.uint64()),
        "float": pa.array([0.1], pa.float32()),
        "decimal": pa.array([Decimal("1.50")], pa.decimal256(20, 2)),
        "texts": pa.array(["a"]).dictionary_encode(),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())),
        "list": pa.array([[at]], pa.list_(pa.timestamp("ns"))),
        "uuid": pa.array([b"0" * 16], pa.binary(16)).cast(pa.uuid()),
    }
    written(tmp_path / "t", {"id": [1]} | columns, kind)
    names = list(columns)
    assert repr(rows(tmp_path, "t", names)) == repr(rows(tmp_path, "SELECT * FROM t", names))


def test_times_that_are_marked_as_utc(tmp_path: Path) -> None:
    """Older versions of pyarrow marked all times as UTC; DuckDB would add a zone to them."""
    times = pa.array([dt.time(1, 2, 3)])
    columns = {"id": [1], "x": times, "y": pa.array([[dt.time(1)]]), "z": times.cast(pa.time64("ns"))}
    written(tmp_path / "t", columns, write_time_adjusted_to_utc=True)
    found = rows(tmp_path, "SELECT * FROM t", ("x", "y"))
    assert found == rows(tmp_path, "t", ("x", "y")) == [(dt.time(1, 2, 3), [dt.time(1)])]
    with pytest.raises(InvalidCall, match="nanoseconds that SQL would drop"):
        rows(tmp_path, "SELECT id, z FROM t", ("z",))


def test_spans_of_parquet_are_texts_of_a_select(tmp_path: Path) -> None:
    """Arrow makes bytes of them, which are no spans."""
    duckdb.sql("SELECT 1 AS id, INTERVAL '26 hours' AS x").write_parquet(f"{tmp_path}/t.parquet")
    with pytest.raises(InvalidCall, match=r"'x' of .* INTERVAL.*; read it as text"):
        rows(tmp_path, "t")
    ((_, text),) = rows(tmp_path, "SELECT id, CAST(x AS VARCHAR) AS x FROM t")
    assert text in ("1 day 02:00:00", "26:00:00")  # as the version of DuckDB writes it
    assert rows(tmp_path, "t", ("id",)) == [(1,)]


# ---------------------------------------------------------------------- folders that are columns


@pytest.mark.parametrize("root", ["lake", "of=us/lake"])
@pytest.mark.parametrize("select", ["sales", "sales/*/*.parquet", "SELECT * FROM sales"])
def test_folders_of_partitions_are_columns(tmp_path: Path, root: str, select: str) -> None:
    """Partitions below the lake's own folder are text columns, and win over a column in the files."""
    lake = tmp_path / root
    written(lake / "sales/year=2024/a", {"id": [1], "year": [1999]})
    written(lake / "sales/year=%C3%A9 1/a", {"id": [2]})
    written(lake / "sales/year=__HIVE_DEFAULT_PARTITION__/a", {"id": [3]})
    assert rows(lake, select, ("id", "year")) == [(1, "2024"), (2, "é 1"), (3, None)]
    assert rows(lake, select, ("year",)) == [("2024",), ("é 1",), (None,)]
    with closing(Datalayer(url=str(lake)).source(select)) as source:
        assert list(source.columns()) == ["id", "year"]


@pytest.mark.parametrize("select", ["sales", "SELECT * FROM sales"])
def test_a_partition_is_a_key_and_a_prompt(tmp_path: Path, server: ScriptedServer, select: str) -> None:
    """A partition is text like a cell of a CSV: two rows of one id have two keys, and SQL can cast."""
    written(tmp_path / "sales/year=2024/a", {"id": [1]})
    written(tmp_path / "sales/year=2025/a", {"id": [1]})
    model = VllmAPI(identifier="m", api_url=server.url, db={"url": str(tmp_path)})
    assert model.predict_in_db("year", select, primary_id=["year", "id"]).succeeded == 2
    assert sorted(post.prompt for post in server.posts) == ["2024", "2025"]
    assert rows(tmp_path, "SELECT * FROM sales WHERE CAST(year AS INT) > 2024", ("id", "year")) == [
        (1, "2025")
    ]


@pytest.mark.parametrize("select", ["sales", "SELECT * FROM sales"])
def test_folders_that_differ_are_no_columns(tmp_path: Path, select: str) -> None:
    written(tmp_path / "sales/year=2024/a", {"id": [1]})
    written(tmp_path / "sales/a", {"id": [2]})
    assert rows(tmp_path, select, ("id",)) == [(1,), (2,)]
    with pytest.raises(InvalidCall, match="no column 'year'"):
        rows(tmp_path, select, ("year",))


def test_folders_that_make_no_sense(tmp_path: Path) -> None:
    written(tmp_path / "twice/x=1/X=2/a", {"id": [1]})
    written(tmp_path / "bytes/x=%FF/a", {"id": [1]})
    with pytest.raises(InvalidCall, match="names 'X' twice"):
        rows(tmp_path, "twice")
    with pytest.raises(InvalidCall, match="is not text"):
        rows(tmp_path, "SELECT * FROM bytes")


def test_a_lake_in_a_folder_like_a_partition(tmp_path: Path, server: ScriptedServer) -> None:
    """The folder is no column of the outputs, whose keys would all be one."""
    written(tmp_path / "id=5/t", {"id": [1, 2], "x": ["a", "b"]})
    model = VllmAPI(identifier="m", api_url=server.url, db={"url": f"{tmp_path}/id=5"})
    assert model.predict_in_db("x", "t").succeeded == 2
    assert model.predict_in_db("x", "t").up_to_date == 2


# ---------------------------------------------------------------------- columns that differ in case only

CASES = {"id": [1], "Text": ["A"], "text": ["b"]}


def cases(kind: str, folder: Path) -> None:
    match kind:
        case "jsonl":
            (folder / "t.jsonl").write_text('{"id": 1, "Text": "A", "text": "b"}\n')
        case "csv":
            (folder / "t.csv").write_text("id,Text,text\n1,A,b\n")
        case _:
            written(folder / "t", CASES, kind)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "csv"])
def test_names_that_differ_in_case(tmp_path: Path, server: ScriptedServer, kind: str) -> None:
    """By name they are two columns; SQL would confuse them, so a SELECT is refused."""
    cases(kind, tmp_path)
    model = VllmAPI(identifier="m", api_url=server.url, db={"url": str(tmp_path)})
    assert model.predict_in_db("text", "t").succeeded == 1
    assert model.predict_in_db("Text", "t", predict_id="n").succeeded == 1
    assert [post.prompt for post in server.posts] == ["b", "A"]
    for select in ("SELECT id, text FROM t", "SELECT * FROM t"):
        with pytest.raises(
            InvalidCall, match="'Text' and 'text', which are one in SQL; name the table itself"
        ):
            model.predict_in_db("text", select, predict_id="o")
    assert model.predict_in_db("id", "SELECT id FROM t", predict_id="p").succeeded == 1


def test_a_select_that_makes_such_names(tmp_path: Path) -> None:
    """A lake refuses it only if such a column is used; SQLite would return the first one for both."""
    written(tmp_path / "t", {"id": [1], "x": ["a"]})
    select = "SELECT id, x AS Text, 'b' AS text FROM t"
    for name in ("Text", "text"):
        with pytest.raises(InvalidCall, match=r"'Text'.*which are one in SQL; rename one with AS"):
            rows(tmp_path, select, (name,))
    assert rows(tmp_path, select, ("id",)) == [(1,)]
    with closing(sqlite3.connect(tmp_path / "f.db")) as file:
        file.execute("CREATE TABLE t AS SELECT 1 AS id, 'a' AS x")
        file.commit()
    for read in (
        lambda: rows(f"sqlite:///{tmp_path}/f.db", select, ("text",)),
        lambda: Datalayer(url=f"sqlite:///{tmp_path}/f.db").source(select).columns(),
    ):
        with pytest.raises(InvalidCall, match="which are one in SQLite"):
            read()
