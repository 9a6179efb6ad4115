"""A file of DuckDB's as a source."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.duckdb_file import DuckDBSource
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import InvalidCall, TablesUnavailable


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A file with a table, a table in a schema and a view."""
    with closing(duckdb.connect(str(tmp_path / "x.duckdb"))) as db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, price DECIMAL(10, 2), made TIMESTAMPTZ, l JSON)")
        db.execute("INSERT INTO t SELECT i, i + 0.5, '2026-11-22 00:00Z', '{\"a\": 1}' FROM range(5000) r(i)")
        db.execute("CREATE SCHEMA s")
        db.execute('CREATE TABLE s."a b" AS SELECT NULL::INTEGER AS id, 1.5 AS price')
        db.execute("CREATE VIEW v AS SELECT * FROM t")
    return f"duckdb:///{tmp_path}/x.duckdb"


def test_tables_views_and_selects(url: str) -> None:
    """Each row once, with its key in its type and values as any source has them."""
    for select in ("t", "v", "main.t", "SELECT * FROM t ;\n"):
        with closing(DuckDBSource(url, select)) as source:
            assert list(source.columns()) == ["id", "price", "made", "l"]
            (kind,) = source.key_types(("id",))
            key, found = pa.schema([("id", kind)]), dict[Any, Any]()
            for part in source.parts(key, ("price", "made", "l"), Unreadable()):
                rows = [row for page in part.values(range(part.count)) for row in page]
                found.update(zip(part.keys["id"].to_pylist(), rows, strict=True))
            assert len(found) == 5000
            assert found[7] == (Decimal("7.50"), dt.datetime(2026, 11, 22, tzinfo=dt.UTC), {"a": 1})
            assert sum(k.num_rows for k in source.keys(key)) == 5000
            assert sum(p.count for p in source.parts(pa.schema([]), ("l",), Unreadable())) == 5000


def test_rows_without_a_key_are_told(url: str) -> None:
    """NULL identifies no row."""
    unreadable = Unreadable()
    with closing(DuckDBSource(url, "s.a b")) as source:
        parts = list(source.parts(pa.schema([("id", pa.int64())]), ("price",), unreadable))
    assert (sum(p.count for p in parts), unreadable.count) == (0, 1)


def test_one_name_in_two_schemas(url: str) -> None:
    """A name in two schemas is refused without the schema."""
    with duckdb.connect(url.removeprefix("duckdb:///")) as db:
        db.execute("CREATE TABLE s.t AS SELECT 7 AS id, 1.5 AS price")
    with pytest.raises(InvalidCall, match=r"'t' may be any of main\.t, s\.t .*with its schema"):
        DuckDBSource(url, "t")
    for select, count in (("main.t", 5000), ("s.t", 1), ("SELECT * FROM s.t", 1)):
        with closing(DuckDBSource(url, select)) as source:
            assert sum(k.num_rows for k in source.keys(pa.schema([("id", pa.int64())]))) == count


@pytest.mark.parametrize(
    "select",
    [
        "nothing",
        "DELETE FROM t",
        "SELECT 1; DELETE FROM t",
        "SELECT * FROM read_csv('/etc/passwd', all_varchar = true)",
        "SELECT nope FROM t",
        "SELECT 1) FROM t; DROP TABLE t; SELECT (1",
    ],
)
def test_what_a_select_may_not_do(url: str, select: str) -> None:
    """A SELECT may not write, open another file or hold two statements."""
    with pytest.raises(InvalidCall):
        DuckDBSource(url, select).columns()
    with closing(DuckDBSource(url, "t")) as source:
        assert sum(p.count for p in source.parts(pa.schema([]), ("id",), Unreadable())) == 5000


def test_two_sources_of_one_file(url: str) -> None:
    """They are read at the same time, also from a file with the name of one of DuckDB's own databases."""
    here = Path(url.removeprefix("duckdb:///"))
    for copied in (here, here.with_name("temp.duckdb"), here.with_name("Memory.x.duckdb")):
        if copied != here:
            shutil.copy(here, copied)
        name = f"duckdb:///{copied}"
        with (
            closing(DuckDBSource(name, "t")) as one,
            closing(DuckDBSource(name, "SELECT * FROM t")) as two,
        ):
            both = [sum(p.count for p in s.parts(pa.schema([]), ("id",), Unreadable())) for s in (one, two)]
        assert both == [5000, 5000]


def test_a_file_that_this_process_has_open(url: str) -> None:
    """It is refused in words, since DuckDB lets no other connection read it."""
    with (
        closing(duckdb.connect(url.removeprefix("duckdb:///"))),
        pytest.raises(TablesUnavailable, match="this process has a connection to the file"),
    ):
        DuckDBSource(url, "t")


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is created, and a file of another format is reported as such."""
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spill"))
    (tmp_path / "text.duckdb").write_text("no database at all, but some text" * 100)
    for path in (
        "duckdb:///" + str(tmp_path / "no.duckdb"),
        f"duckdb:///{tmp_path}/text.duckdb",
        "duckdb://",
    ):
        with pytest.raises(InvalidCall, match="DuckDB"):
            DuckDBSource(path, "t")
    assert {p.name for p in tmp_path.rglob("*")} == {"spill", "text.duckdb"}


def test_a_workspace_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary folder is removed, whatever failed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Exception, match=r"filesystem|argument|incompatible"):
        Workspace("300MB", filesystem=object())
    assert not list(tmp_path.iterdir())
