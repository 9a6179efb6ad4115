"""Parquet as a source: each value as its file has it, memory bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
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

from tests.beside import in_pandas
from tests.datalayer.sources.columnar import NASTY, files, parts, rows, schema, written
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.arrow_file import ArrowFile
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.frames import Frame
from vllm_tasks.datalayer.sources.parquet import Parquet
from vllm_tasks.datalayer.values import Nanoseconds
from vllm_tasks.errors import InvalidCall, TablesUnavailable


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
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = [tuple(map(int, line.split())) for line in said.stdout.splitlines()]
    assert [count for count, _, _ in found] == [150, 100, 400]
    assert all(largest <= 17_000_000 for _, largest, _ in found)
    assert all(grown < most for (_, _, grown), most in zip(found, (110, 220, 280), strict=True)), found
