"""Parquet, Arrow, tables in memory and Iceberg as sources: each value as its file has it, memory bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from tests.beside import in_pandas, pandas
from vllm_tasks.datalayer.sources import Part, Source, Unreadable
from vllm_tasks.datalayer.sources.arrow_file import ArrowFile
from vllm_tasks.datalayer.sources.arrow_stream import ColumnStream
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.frames import Frame
from vllm_tasks.datalayer.sources.iceberg import Iceberg, is_iceberg, refuse_inside
from vllm_tasks.datalayer.sources.parquet import Parquet
from vllm_tasks.datalayer.values import Nanoseconds
from vllm_tasks.errors import InvalidCall, TablesUnavailable

LOCAL = fsspec.filesystem("file")
NASTY = ["", " a ", "NULL", "12.50", '{"a": 1}', "Zoë\n😀", "x" * 3000, None]


def files(*paths: Path) -> list[DataFile]:
    found = [DataFile.of(LOCAL, str(path), path.name) for path in paths]
    return [file for file in found if file is not None]


def schema(source: Source, key: Sequence[str]) -> pa.Schema:
    return pa.schema(list(zip(key, source.key_types(key), strict=True)))


def parts(
    source: Source, columns: Sequence[str], *key: str, unreadable: Unreadable | None = None
) -> list[Part]:
    """Parts whose values are never read."""
    return list(source.parts(schema(source, key or ("id",)), columns, unreadable or Unreadable()))


def rows(source: Source, *columns: str, key: Sequence[str] = ("id",)) -> list[tuple[Any, ...]]:
    """All rows, in the way a run reads them."""
    found = []
    for part in source.parts(schema(source, key), columns, Unreadable()):
        for some in part.values(range(part.keys.num_rows)):
            found += some
    return found


def written(path: Path, table: Any, **options: Any) -> Parquet:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return Parquet(files(path))


@pytest.mark.parametrize("group", [1, 3, 100])
def test_a_row_is_the_same_however_its_file_is_cut(tmp_path: Path, group: int) -> None:
    source = written(tmp_path / "t.parquet", {"id": range(8), "text": NASTY}, row_group_size=group)
    assert source.columns() == ["id", "text"]
    assert rows(source, "text", "id") == list(zip(NASTY, range(8), strict=True))
    (keys,) = [pa.concat_tables(source.keys(schema(source, ["id"])))]
    assert keys["id"].to_pylist() == list(range(8))


def test_writers_agree(tmp_path: Path) -> None:
    table = pa.table({"id": range(8), "text": NASTY})
    pq.write_table(table, tmp_path / "arrow.parquet")
    in_pandas(table).to_parquet(tmp_path / "pandas.parquet")
    pl.DataFrame(table).write_parquet(tmp_path / "polars.parquet")
    duckdb.from_arrow(table).write_parquet(str(tmp_path / "duckdb.parquet"))
    for path in tmp_path.iterdir():
        assert rows(Parquet(files(path)), "id", "text") == list(zip(range(8), NASTY, strict=True)), path.name


def test_types_of_parquet(tmp_path: Path) -> None:
    zoned = pa.array([datetime(2024, 1, 2, 3, tzinfo=UTC)], pa.timestamp("us", "Europe/Berlin"))
    values = {
        "unsigned": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        "short": (pa.array([0.1], pa.float32()), 0.1),
        "half": (pa.array([0.1], pa.float16()), 0.1),
        "decimal": (pa.array([Decimal("12.50")]), Decimal("12.50")),
        "zoned": (zoned, datetime(2024, 1, 2, 3, tzinfo=UTC)),
        "nanos": (pa.array([1], pa.timestamp("ns")), Nanoseconds.of(1, None)),
        "far": (pa.array([3_000_000], pa.int32()).cast(pa.date32()), "10183-09-21"),
        "duration": (pa.array([90], pa.duration("s")), timedelta(seconds=90)),
        "category": (pa.array(["a"]).dictionary_encode(), "a"),
        "uuid": (pa.array([b"\x00" * 16], pa.uuid()), "00000000-0000-0000-0000-000000000000"),
        "json": (pa.array(['{"a": 1.50}'], pa.json_()), {"a": 1.5}),
        "chat": (pa.array([[{"role": "user", "content": "x"}]]), [{"role": "user", "content": "x"}]),
        "view": (pa.array(["a view"], pa.string_view()), "a view"),
        "empty": (pa.nulls(1), None),
        "a.b": (pa.array([1]), 1),
        "a": (pa.array([{"b": 2}]), {"b": 2}),
    }
    source = written(tmp_path / "t.parquet", {"id": [1]} | {name: pair[0] for name, pair in values.items()})
    (found,) = rows(source, *values)
    assert dict(zip(values, found, strict=True)) == {name: pair[1] for name, pair in values.items()}
    assert str(dict(zip(values, found, strict=True))["nanos"]) == "1970-01-01 00:00:00.000000001"


def test_int96_has_nanoseconds_and_all_years(tmp_path: Path) -> None:
    """Spark's favourite last day is another day in Arrow's nanoseconds."""
    last, near = datetime(9999, 12, 31), Nanoseconds.of(1_700_000_000_000_000_001, None)
    micros = pa.array([last, None, datetime(1, 1, 1)], pa.timestamp("us"))
    path = tmp_path / "t.parquet"
    table = pa.table({"id": [1, 2, 3], "at": micros})
    source = written(path, table, use_deprecated_int96_timestamps=True)
    assert rows(source, "at") == [(last,), (None,), (datetime(1, 1, 1),)]
    nanos = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    source = written(path, {"id": [1], "at": nanos}, use_deprecated_int96_timestamps=True)
    ((found,),) = rows(source, "at")
    assert (str(found), found) == (str(near), near)
    source = written(path, table, use_deprecated_int96_timestamps=True)
    assert schema(source, ["at"]).types == [pa.timestamp("us")]
    assert [key for part in parts(source, [], "at") for key in part.keys["at"].to_pylist()] == [
        last,
        datetime(1, 1, 1),
    ]


def test_bytes_that_are_no_text_cost_their_row(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    source = written(tmp_path / "t.parquet", {"id": [1, 2], "text": wrong})
    assert rows(source, "text") == [("ok",), ("\udcff",)]
    unreadable = Unreadable()
    (part,) = parts(source, ["id"], "text", unreadable=unreadable)
    assert part.keys["text"].to_pylist() == ["ok"]
    assert unreadable.count == 1


def test_only_row_groups_with_a_wanted_row_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    source = written(path, {"id": range(300), "text": [f"{i:0500}" for i in range(300)]}, row_group_size=100)
    chunk = pq.read_metadata(path).row_group(1).column(1)
    (part,) = parts(source, ["text"])
    with path.open("r+b") as file:  # damages the second row group
        file.seek(chunk.data_page_offset)
        file.write(b"\xff" * 300)
    assert [int(text) for some in part.values([0, 99, 200]) for (text,) in some] == [0, 99, 200]
    (part,) = parts(source, ["text"])
    with pytest.raises(InvalidCall, match=r"cannot read t\.parquet"):
        list(part.values([100]))


def test_parts_end_within_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in {"PART_ROWS": 300, "KEY_ROWS": 100}.items():
        monkeypatch.setattr(f"vllm_tasks.datalayer.sources.pieces.{name}", most)
    texts = [None if i % 7 == 0 else str(i) for i in range(1000)]
    source = written(tmp_path / "t.parquet", {"id": texts, "n": range(1000)}, row_group_size=550)
    unreadable, found, count = Unreadable(), [], 0
    for part in source.parts(schema(source, ["id"]), ["n", "id"], unreadable):
        count += 1
        every = range(0, part.keys.num_rows, 3)
        found += [row for some in part.values(every) for row in some]
        assert part.keys.take(pa.array(every))["id"].to_pylist() == [key for _, key in found[-len(every) :]]
    assert count > 3
    assert all(key == str(n) for n, key in found)
    assert unreadable.count == 143
    assert "NULL" in unreadable.examples[0]


def test_a_folder_that_evolved(tmp_path: Path) -> None:
    """Columns are put together by name; a value is that of its own file."""
    written(tmp_path / "0.parquet", {"id": pa.array([1], pa.int32()), "x": pa.array([0.1], pa.float32())})
    written(tmp_path / "1.parquet", {"x": pa.array([0.1]), "id": pa.array([2**40]), "new": ["a"]})
    written(tmp_path / "2.parquet", {"id": pa.array([2**64 - 1], pa.uint64()), "x": [7]})
    source = Parquet(files(*sorted(tmp_path.iterdir())))
    assert source.columns() == ["id", "x", "new"]
    assert source.key_types(["id"]) == [pa.decimal128(20, 0)]
    assert rows(source, "id", "x", "new") == [(1, 0.1, None), (2**40, 0.1, "a"), (2**64 - 1, 7, None)]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.decimal128(10, 2), pa.decimal128(12, 4), pa.decimal128(12, 4)),
        (pa.int16(), pa.decimal128(10, 2), pa.decimal128(21, 2)),
        (pa.string(), pa.large_string(), pa.string()),
        (pa.null(), pa.int64(), pa.int64()),
        (pa.int64(), pa.string(), None),
        (pa.date32(), pa.timestamp("us"), None),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
        (pa.int64(), pa.decimal128(38, 30), None),
    ],
)
def test_keys_of_several_types(tmp_path: Path, one: pa.DataType, other: pa.DataType, both: Any) -> None:
    written(tmp_path / "0.parquet", {"id": pa.nulls(1, one)})
    written(tmp_path / "1.parquet", {"id": pa.nulls(1, other)})
    source = Parquet(files(tmp_path / "0.parquet", tmp_path / "1.parquet"))
    if both is not None:
        assert source.key_types(["id"]) == [both]
    else:
        with pytest.raises(InvalidCall, match=r"0\.parquet.*1\.parquet"):
            source.key_types(["id"])


def test_a_file_without_the_key_has_no_rows(tmp_path: Path) -> None:
    written(tmp_path / "0.parquet", {"id": [1], "text": ["a"]})
    written(tmp_path / "1.parquet", {"text": ["b", "c"]})
    source, unreadable = Parquet(files(tmp_path / "0.parquet", tmp_path / "1.parquet")), Unreadable()
    (part,) = parts(source, ["text"], unreadable=unreadable)
    assert list(part.values([0])) == [[("a",)]]
    assert unreadable.count == 2
    assert unreadable.examples[0].startswith("1.parquet")


def test_a_table_is_read_without_a_key(tmp_path: Path) -> None:
    table = pa.table({"wide": ["x" * 100, "y"], "id": [None, 1]})
    pa.feather.write_feather(table, tmp_path / "t.arrow")
    for source in (
        written(tmp_path / "t.parquet", table),
        ArrowFile(files(tmp_path / "t.arrow")),
        Frame(table),
    ):
        (part,) = source.parts(pa.schema([]), ["id"], Unreadable())
        assert part.count == 2
        assert list(part.values([0, 1])) == [[(None,), (1,)]]
        (part,) = source.parts(pa.schema([]), [], Unreadable())
        assert list(part.values([1])) == [[()]]
        (part,) = source.parts(pa.schema([]), ["none"], Unreadable())
        assert list(part.values([1])) == [[(None,)]]


def test_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["id", "x", "x"])
    source = written(tmp_path / "t.parquet", table)
    assert rows(source, "id") == [(1,)]
    with pytest.raises(InvalidCall, match="2 columns 'x'"):
        rows(source, "x")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 this is no Parquet file")
    with pytest.raises(InvalidCall, match=r"cannot read t\.parquet"):
        Parquet(files(path)).columns()
    source = Parquet(files(path))
    path.unlink()
    with pytest.raises(TablesUnavailable, match=r"cannot read t\.parquet"):
        source.columns()


def test_remote_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        with memory.open("/columnar/t.parquet", "wb") as file:
            pq.write_table(pa.table({"id": range(8), "text": NASTY}), file)
        with (
            memory.open("/columnar/t.arrow", "wb") as file,
            pa.ipc.new_file(file, pa.schema({"id": pa.int64()})) as ipc,
        ):
            ipc.write_table(pa.table({"id": range(8)}))
        remote = [DataFile.of(memory, f"/columnar/t.{kind}", kind) for kind in ("parquet", "arrow")]
        assert rows(Parquet([file for file in remote[:1] if file]), "text") == [(text,) for text in NASTY]
        assert rows(ArrowFile([file for file in remote[1:] if file]), "id") == [(i,) for i in range(8)]
    finally:
        memory.rm("/columnar", recursive=True)


PEAK = """
import resource, sys
import fsspec
import pyarrow as pa
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.parquet import Parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    source = Parquet([DataFile.of(fsspec.filesystem("file"), path, path)])
    rows = largest = 0
    for part in source.parts(pa.schema({"id": pa.int64()}), source.columns()[1:], Unreadable()):
        for some in part.values(range(part.keys.num_rows)):
            rows += len(some)
            size = sum(len(value) if isinstance(value, bytes | str) else 8 for row in some for value in row)
            largest = max(largest, size)
    print(rows, largest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_is_bounded_in_bytes(tmp_path: Path) -> None:
    """150 MB of pictures in one row group, in pages of 1 MB, as all but pyarrow write them; thousands of
    columns; 400 MB of texts that a dictionary of 1 MB holds: no file says their size.
    """
    pictures, columns, texts = (tmp_path / f"{name}.parquet" for name in ("pictures", "columns", "texts"))
    table = pa.table({"id": range(150), "picture": [os.urandom(1_000_000) for _ in range(150)]})
    pq.write_table(table, pictures, write_batch_size=1, use_dictionary=False)
    written(columns, {"id": range(100)} | {f"c{i}": range(100) for i in range(3000)})
    written(texts, {"id": range(400), "document": ["x" * 1_000_000] * 400})
    command = [sys.executable, "-c", PEAK, str(pictures), str(columns), str(texts)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found = [tuple(map(int, line.split())) for line in said.stdout.splitlines()]
    assert [count for count, _, _ in found] == [150, 100, 400]
    assert all(largest <= 17_000_000 for _, largest, _ in found)
    assert all(grown < most for (_, _, grown), most in zip(found, (110, 220, 280), strict=True)), found


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


def iceberg(folder: Path) -> Any:
    """Three rows, of which one was deleted since, a column renamed, one added, and a row appended."""
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.types import StringType

    catalog = SqlCatalog("tests", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}")
    catalog.create_namespace("lake")
    rows = pa.table({"id": range(3), "body": ["a", "b", "deleted"]})
    table = catalog.create_table("lake.t", rows.schema, location=f"file://{folder}/t")
    table.append(rows)
    table.delete("id = 2")
    with table.update_schema() as change:
        change.rename_column("body", "text")
    with table.update_schema() as change:
        change.add_column("lang", StringType())
    table.append(pa.table({"id": [3], "text": ["c"], "lang": ["de"]}))
    return table


def add_deletes(folder: Path, table: Any, content: int) -> None:
    """Delete the row 0 in its snapshot, as other engines do: by its position (1) or by its value (2)."""
    from pyiceberg.manifest import DataFile as Entry
    from pyiceberg.manifest import (
        DataFileContent,
        FileFormat,
        ManifestContent,
        ManifestEntry,
        ManifestEntryStatus,
        ManifestWriterV2,
        write_manifest_list,
    )
    from pyiceberg.typedef import Record

    class Deletes(ManifestWriterV2):  # pyiceberg itself writes none
        def content(self) -> ManifestContent:
            return ManifestContent.DELETES

        @property
        def _meta(self) -> dict[str, str]:
            return {**super()._meta, "content": "deletes"}

    task = next(
        t for t in table.scan().plan_files() if 0 in pq.read_table(t.file.file_path[7:])["id"].to_pylist()
    )
    rows = pa.table({"file_path": [task.file.file_path], "pos": [0]} if content == 1 else {"id": [0]})
    pq.write_table(rows, folder / "t" / "data" / "deletes.parquet")
    deletes = Entry.from_args(
        content=DataFileContent(content),
        file_path=f"file://{folder}/t/data/deletes.parquet",
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=(folder / "t" / "data" / "deletes.parquet").stat().st_size,
        equality_ids=[1] if content == 2 else None,
    )
    deletes.spec_id = table.spec().spec_id
    snapshot, io = table.current_snapshot(), table.io
    path = f"file://{folder}/t/metadata/deletes.avro"
    with Deletes(table.spec(), table.schema(), io.new_output(path), snapshot.snapshot_id, "null") as writer:
        entry = {"status": ManifestEntryStatus.ADDED, "snapshot_id": snapshot.snapshot_id}
        writer.add_entry(ManifestEntry.from_args(**entry, data_file=deletes))
    manifests = snapshot.manifests(io)
    number = snapshot.sequence_number
    Path(snapshot.manifest_list[7:]).unlink()
    output = io.new_output(snapshot.manifest_list)
    with write_manifest_list(
        2, output, snapshot.snapshot_id, snapshot.parent_snapshot_id, number, "null"
    ) as made:
        made.add_manifests([*manifests, writer.to_manifest_file()])


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    table = iceberg(tmp_path)
    yield table
    table.catalog.engine.dispose()


def test_iceberg_has_the_rows_of_its_snapshot(tmp_path: Path, changed: Any) -> None:
    source = Iceberg(LOCAL, f"{tmp_path}/t", "t")
    assert source.columns() == ["id", "text", "lang"]
    wanted = [(0, "a", None), (1, "b", None), (3, "c", "de")]
    assert sorted(rows(source, "id", "text", "lang")) == wanted
    assert sorted(
        key for table in source.keys(schema(source, ["id"])) for key in table["id"].to_pylist()
    ) == [0, 1, 3]
    with duckdb.connect() as con:
        con.register("t", ColumnStream(source, ["id", "text"]))
        assert con.execute("SELECT max(text) FROM t WHERE id < 3").fetchall() == [("b",)]
    assert sum(part.count for part in source.parts(pa.schema([]), [], Unreadable())) == 3
    changed.delete("id = 0")
    assert sorted(rows(source, "id", "text", "lang")) == wanted, "the snapshot is that of the start"
    assert sorted(rows(Iceberg(LOCAL, f"{tmp_path}/t", "t"), "id")) == [(1,), (3,)]


def test_iceberg_is_known_by_its_metadata(tmp_path: Path, changed: Any) -> None:
    assert is_iceberg(LOCAL, f"{tmp_path}/t")
    assert not is_iceberg(LOCAL, f"{tmp_path}/t/data")
    assert not is_iceberg(LOCAL, f"{tmp_path}/none")
    for inside in (f"{tmp_path}/t/data", next(str(p) for p in tmp_path.glob("t/data/*.parquet"))):
        with pytest.raises(InvalidCall, match="Iceberg table 't'"):
            refuse_inside(LOCAL, inside, str(tmp_path), "t/data")
    refuse_inside(LOCAL, f"{tmp_path}/other/x.parquet", str(tmp_path), "other")


def test_the_metadata_that_the_hint_names_counts(tmp_path: Path, changed: Any) -> None:
    metadata = tmp_path / "t" / "metadata"
    first = min(metadata.glob("*.metadata.json"))
    (metadata / "version-hint.text").write_text(first.name.removesuffix(".metadata.json"))
    source = Iceberg(LOCAL, f"{tmp_path}/t", "t")
    assert source.columns() == ["id", "body"]
    assert rows(source, "id") == []


@pytest.mark.parametrize("metadata", ['{"format-version": 2, "current-snapshot-id": 2}', "", "{"])
def test_broken_iceberg_is_named(tmp_path: Path, metadata: str) -> None:
    (tmp_path / "t" / "metadata").mkdir(parents=True)
    (tmp_path / "t" / "metadata" / "00001-z.metadata.json").write_text(metadata)
    with pytest.raises(InvalidCall, match="Iceberg table t"):
        Iceberg(LOCAL, f"{tmp_path}/t", "t")


def test_iceberg_that_was_moved(tmp_path: Path, changed: Any) -> None:
    (tmp_path / "t").rename(tmp_path / "moved")
    with pytest.raises(InvalidCall, match="moved or copied"):
        Iceberg(LOCAL, f"{tmp_path}/moved", "moved")


def test_iceberg_outside_of_the_places(tmp_path: Path, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lake" / "t").mkdir(parents=True)
    (tmp_path / "t" / "metadata").rename(tmp_path / "lake" / "t" / "metadata")
    (tmp_path / "t" / "metadata").symlink_to(tmp_path / "lake" / "t" / "metadata")
    monkeypatch.setenv("VLLM_TASKS_PLACES", f'["{tmp_path}/lake"]')
    with pytest.raises(InvalidCall, match="VLLM_TASKS_PLACES"):
        Iceberg(LOCAL, f"{tmp_path}/lake/t", "t")


@pytest.mark.parametrize("content", [1, 2])
def test_iceberg_with_deletes_beside_its_files(tmp_path: Path, changed: Any, content: int) -> None:
    """Rows deleted by their position are left out; pyiceberg does not know those deleted by a value."""
    add_deletes(tmp_path, changed, content)
    if content == 1:
        assert sorted(rows(Iceberg(LOCAL, f"{tmp_path}/t", "t"), "id")) == [(1,), (3,)]
    else:
        with pytest.raises(InvalidCall, match="equality deletes"):
            Iceberg(LOCAL, f"{tmp_path}/t", "t")


def test_iceberg_without_pyiceberg(tmp_path: Path, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog.noop", None)
    monkeypatch.delitem(sys.modules, "vllm_tasks.datalayer.sources.iceberg_files", raising=False)
    with pytest.raises(InvalidCall, match=r"Iceberg table.*pip install 'vllm-tasks\[iceberg\]'"):
        Iceberg(LOCAL, f"{tmp_path}/t", "t")
