"""Arrow files and tables in memory as sources: each value as it is there."""

from __future__ import annotations

import tempfile
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pytest

from tests.beside import in_pandas, pandas
from tests.datalayer.sources.columnar import NASTY, files, parts, rows
from vllm_tasks.datalayer.sources.arrow_file import ArrowFile
from vllm_tasks.datalayer.sources.arrow_stream import ColumnStream
from vllm_tasks.datalayer.sources.frames import Frame
from vllm_tasks.errors import InvalidCall


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_arrow_files(tmp_path: Path, compression: str) -> None:
    table = pa.table({"id": range(8), "text": NASTY, "wide": [b"x" * 100] * 8})
    pa.feather.write_feather(table, tmp_path / "f.feather", compression=compression, chunksize=3)
    codec = None if compression == "uncompressed" else compression
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(tmp_path / "s.arrow", table.schema, options=options) as stream:
        stream.write_table(table, max_chunksize=3)
    for path in tmp_path.iterdir():
        source = ArrowFile(files(path))
        assert rows(source, "text", "id") == list(zip(NASTY, range(8), strict=True))
        assert rows(source, "id", key=["id", "wide"]) == [(i,) for i in range(8)]
        (part,) = parts(source, ["id"])
        assert part.keys["id"].to_pylist() == list(range(8))


def test_arrow_of_polars(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"id": range(8), "text": NASTY, "kind": pl.Series(list("aabbccdd"), dtype=pl.Categorical)}
    )
    frame.write_ipc(tmp_path / "t.arrow")
    assert rows(ArrowFile(files(tmp_path / "t.arrow")), "text", "kind") == list(
        zip(NASTY, "aabbccdd", strict=True)
    )


def test_other_files_named_arrow(tmp_path: Path) -> None:
    path = tmp_path / "t.feather"
    path.write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(InvalidCall, match="version 1"):
        ArrowFile(files(path)).columns()
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidCall, match=r"cannot read t\.feather"):
        ArrowFile(files(path)).columns()
    path.write_bytes(b"")
    with pytest.raises(InvalidCall, match=r"cannot read t\.feather"):
        ArrowFile(files(path)).columns()


def frames() -> dict[str, Any]:
    table = pa.table({"id": range(8), "text": NASTY})
    return {
        "pyarrow": table,
        "batch": table.to_batches()[0],
        "pandas": in_pandas(table),
        "index": in_pandas(table).set_index(pandas().Index(range(8, 0, -1), name="reversed")),
        "objects": in_pandas(table).astype({"text": object}),
        "polars": pl.DataFrame(table),
        "chunks": pl.concat([pl.DataFrame(table)[:3], pl.DataFrame(table)[3:]], rechunk=False),
        "reader": table.to_reader(max_chunksize=3),
        "duckdb": duckdb.from_arrow(table),
    }


@pytest.mark.parametrize("name", list(frames()))
def test_frames(name: str) -> None:
    source = Frame(frames()[name])
    assert source.columns() == ["id", "text"]
    for _ in range(2):
        assert rows(source, "text", "id") == list(zip(NASTY, range(8), strict=True))
    source.close()


def test_a_stream_is_kept_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kinds = [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", "d"]).dictionary_encode()]
    batches = [
        pa.record_batch({"id": [i, i + 1], "kind": kind}) for i, kind in zip((0, 2), kinds, strict=True)
    ]
    source = Frame(pa.RecordBatchReader.from_batches(batches[0].schema, batches))
    assert len(list(tmp_path.iterdir())) == 1
    assert rows(source, "kind") == rows(source, "kind") == [("a",), ("b",), ("c",), ("d",)]
    source.close()
    assert not list(tmp_path.iterdir())


def test_a_stream_that_breaks_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InvalidCall, match="DuckDBPyRelation"):
        Frame(duckdb.sql("SELECT i AS id, CAST(repeat('x', i) AS INTEGER) AS n FROM range(3) AS r(i)"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [[{"id": 1}], {"id": [1]}, "t", None, 7])
def test_what_is_no_frame(data: Any) -> None:
    with pytest.raises(InvalidCall, match=r"pyarrow\.Table\.from_pylist"):
        Frame(data)


def test_pandas_that_arrow_refuses() -> None:
    """A column costs those who name it; a cell of another type than its neighbours keeps its own value."""
    odd = pandas().DataFrame({"id": [1, 2, 3], "o": [object()] * 3, "x": ["a", 5, None], "c": [1j] * 3})
    frame = Frame(odd)
    assert rows(frame, "x") == [("a",), (5,), (None,)]
    for name in ("o", "c"):
        with pytest.raises(
            InvalidCall, match=f"cannot read the column '{name}' of the pandas DataFrame.*astype"
        ):
            rows(frame, name)
    with pytest.raises(InvalidCall, match=r"union.*cannot be a key"):
        frame.key_types(["x"])
    twice = Frame(pandas().DataFrame([[1, 2, 3]], columns=["id", "t", "t"]))
    assert rows(twice, "id") == [(1,)]
    with pytest.raises(InvalidCall, match="2 columns 't'"):
        rows(twice, "t")
    months = pandas().DataFrame({"id": [1, 2], "t": pandas().PeriodIndex(["2024-01", None], freq="M")})
    assert rows(Frame(months), "t") == [("2024-01",), (None,)]
    sparse = pandas().DataFrame({"id": [1], "t": pandas().arrays.SparseArray([5])})
    assert rows(Frame(sparse), "t") == [(5,)]
    with pytest.raises(InvalidCall, match="a column, not a table"):
        Frame(odd["x"])
    frame = Frame(
        pandas().DataFrame(
            {"id": [1, 2], "x": [0.5, float("nan")], "at": pandas().to_datetime(["2024-01-01", None])}
        )
    )
    assert rows(frame, "x", "at") == [(0.5, datetime(2024, 1, 1)), (None, None)]


def test_objects_of_pandas_keep_their_types() -> None:
    """Arrow would make a time its date, a text its bytes, 1 a float; half a character fails its row alone."""
    columns: dict[str, list[Any]] = {
        "times": [date(2024, 1, 2), datetime(2024, 1, 2, 3, 4), None],
        "bytes": [b"a", "a", None],
        "numbers": [1, 1.5, None],
        "halves": ["a", "\ud83d", None],
        "alone": ["\ud83d", None, None],
    }
    frame = Frame(pandas().DataFrame({"id": [1, 2, 3], **columns}, dtype=object))
    for name, values in columns.items():
        found = [value for (value,) in rows(frame, name)]
        assert list(map(type, found)) == list(map(type, values))
        if name not in ("halves", "alone"):
            assert found == values


def test_polars_that_arrow_refuses() -> None:
    """A column that Arrow lacks costs those who name it, as their value or their key."""
    columns = {"id": [1], "wide": [2**100], "o": [object()], "text": ["a"]}
    odd = pl.DataFrame(columns, schema_overrides={"wide": pl.Int128, "o": pl.Object})
    frame = Frame(odd)
    assert frame.columns() == ["id", "wide", "o", "text"]
    assert rows(frame, "text") == [("a",)]
    for name in ("wide", "o"):
        with pytest.raises(InvalidCall, match=rf"the column '{name}' of the polars DataFrame.*cast\(str\)"):
            rows(frame, name)
        with pytest.raises(InvalidCall, match=f"cannot read the column '{name}'"):
            frame.key_types([name])
    cast = Frame(odd.with_columns(pl.col("wide").cast(str)))
    assert rows(cast, "wide") == [(str(2**100),)]


def test_a_dictionary_of_decimals_in_a_select(tmp_path: Path) -> None:
    """Arrow makes no such array from Python values, and has none without rows either."""
    amounts = pa.array([Decimal("1.50"), Decimal("2.00")], pa.decimal128(5, 2)).dictionary_encode()
    table = pa.table({"id": [1, 2], "amount": amounts})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    with duckdb.connect() as con:
        con.register("t", ColumnStream(ArrowFile(files(tmp_path / "t.arrow")), ["id", "amount"]))
        found = con.execute("SELECT amount FROM t ORDER BY id").fetchall()
    assert found == [(Decimal("1.50"),), (Decimal("2.00"),)]


def test_a_select_reads_a_stream_as_often_as_it_likes(tmp_path: Path) -> None:
    for name, table in {
        "0": pa.table({"id": pa.array([1, 2], pa.int32()), "text": pa.array(["a", "b"], pa.string_view())}),
        "1": pa.table({"id": [3], "day": [date(2024, 1, 2)]}),
    }.items():
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
    source = ArrowFile(files(*sorted(tmp_path.iterdir())))
    with duckdb.connect() as con:
        con.register("t", ColumnStream(source, ["text", "day", "id"]))
        for _ in range(2):
            assert con.execute("SELECT id, text, day FROM t ORDER BY id").fetchall() == [
                (1, "a", None),
                (2, "b", None),
                (3, None, date(2024, 1, 2)),
            ]
        assert con.execute("SELECT count(*) FROM t AS a JOIN t AS b USING (id)").fetchall() == [(3,)]
