"""Text files as streams: SQL, compression, remote files, bounded memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.datalayer.sources.text_files import Write, lines, packed, read, sql
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.sources import PART_BYTES, Unreadable
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.stream import Stream
from vllm_tasks.errors import InvalidCall, TablesUnavailable


def test_sql_gives_the_values_that_reading_gives(write: Write) -> None:
    rows = [
        '{"id": 1, "whole": 1, "mixed": 1, "float": 0.5, "digits": 1.50, "text": "a", "flag": true,'
        ' "deep": {"a": 1.50}}',
        '{"id": 2, "whole": 9007199254740993, "mixed": "1", "float": 1e16, "digits": 2, "text": "",'
        ' "flag": false, "deep": [1, {"b" : "\\ud83d"}], "late": "x"}',
        '{"id": 3, "whole": null, "mixed": {"x": [ 1,2 ]}, "deep": "text"}',
        "no JSON",
    ]
    source = JsonLines([write("t.jsonl", lines(rows))])
    columns = list(source.columns())
    stream = Stream(source, columns)
    kinds = {field.name: getattr(field.type, "extension_name", str(field.type)) for field in stream.schema}
    assert kinds == {
        "id": "int64", "whole": "int64", "mixed": "arrow.json", "float": "double", "digits": "double",
        "text": "string", "flag": "bool", "deep": "arrow.json", "late": "string",
    }  # fmt: skip
    with duckdb.connect() as db:
        db.register("t", stream)
        for _ in range(2):  # a fresh pass each time
            assert db.execute("SELECT whole FROM t ORDER BY id").fetchall() == [
                (1,),
                (9007199254740993,),
                (None,),
            ]
            assert source.left_out.count == 1
        table = db.sql("SELECT deep, mixed, digits FROM t ORDER BY id").to_arrow_table()
    assert table["deep"].to_pylist() == ['{"a": 1.50}', '[1, {"b" : "\\ud83d"}]', '"text"']
    assert table["mixed"].to_pylist() == ["1", '"1"', '{"x": [ 1,2 ]}']
    # Numbers that are not all whole are compared as numbers, so their spelling is the table's alone.
    assert table["digits"].to_pylist() == [1.5, 2.0, None]


def test_floats_that_print_alike_are_floats_in_sql(write: Write) -> None:
    source = JsonLines([write("t.jsonl", '{"id": 1, "x": 0.1}\n{"id": 2, "x": 2.5}\n')])
    assert sql(source, ["x"], "SELECT sum(x * 2) FROM t") == [(5.2,)]
    csv_source = Csv([write("t.csv", "id,x\n1,0.10\n")])
    assert sql(csv_source, ["x"], "SELECT x, CAST(x AS DOUBLE) FROM t") == [("0.10", 0.1)]
    with pytest.raises(InvalidCall, match="did you mean 'x'"):
        Stream(csv_source, ["X"])


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_and_their_truncated_ends(write: Write, kind: str) -> None:
    rows = [(i, f"t{i * 7919 % 100_003}") for i in range(5_000 if kind == "gz" else 20_000)]
    contents = {
        "csv": "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows),
        "JSONL": lines([{"id": str(i), "text": t} for i, t in rows]),
    }
    for ending, content in contents.items():
        make = Csv if ending == "csv" else JsonLines
        whole = packed(kind, content.encode())
        wanted = {str(i): t for i, t in rows}
        assert read(make([write(f"t.{ending}.{kind}", whole)]))[0] == wanted
        two = packed(kind, content[:1000].encode()) + packed(kind, content[1000:].encode())
        assert read(make([write(f"t.{ending}.{kind}", two)]))[0] == wanted  # one behind the other
        for cut in (len(whole) - 3, len(whole) * 2 // 3):
            found, errors, unreadable = read(make([write(f"t.{ending}.{kind}", whole[:cut])]))
            assert found.items() <= wanted.items()
            assert list(found) == list(wanted)[: len(found)]
            assert len(found) > (4_990 if kind == "gz" and cut == len(whole) - 3 else 5)
            assert not errors
            assert unreadable.count == 1
            assert "damaged" in unreadable.examples[0]
        with pytest.raises(InvalidCall, match="is not compressed with"):
            make([write(f"t.{ending}.{kind}", content)]).columns()


class Lost(MemoryFileSystem):
    """A filesystem whose connection ends behind a number of bytes, and whose files cannot seek."""

    limit = 10**9
    open_files: list[Any] = []
    cachable = False

    def _open(self, path: str, mode: str = "rb", **given: Any) -> Any:
        content = super()._open(path, mode, **given).read() if mode == "rb" else None
        if content is None:
            return super()._open(path, mode, **given)
        file = Dropping(content, self.limit)
        self.open_files.append(file)
        return file


class Dropping(io.RawIOBase):
    def __init__(self, content: bytes, limit: int) -> None:
        self.content, self.limit, self.at = content, limit, 0

    def read(self, size: int = -1) -> bytes:
        if self.at >= self.limit:
            raise OSError("connection reset")
        some = self.content[self.at : self.at + min(size, 100_000)]
        self.at += len(some)
        return some


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.zst"])
def test_a_connection_lost_in_the_middle_may_pass(name: str) -> None:
    rows = [(i, hashlib.sha256(b"%d" % i).hexdigest()) for i in range(40_000)]
    content = "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows)
    if "jsonl" in name:
        content = lines([{"id": str(i), "text": t} for i, t in rows])
    raw = content.encode()
    packing = name.rpartition(".")[2]
    fs = Lost()
    fs.pipe(f"/lost/{name}", packed(packing, raw) if packing in ("gz", "zst") else raw)
    file = DataFile.of(fs, f"/lost/{name}", name)
    assert file is not None
    source = Csv([file]) if "csv" in name else JsonLines([file])
    try:
        assert len(read(source)[0]) == 40_000
        fs.limit = 100_000
        with pytest.raises(TablesUnavailable, match="connection reset"):
            list(source.parts(pa.schema([("id", pa.string())]), ["text"], Unreadable()))
        fs.limit = 10**9
        assert len(read(source)[0]) == 40_000
        assert all(each.closed for each in fs.open_files)
    finally:
        fs.rm("/lost", recursive=True)
        fs.open_files.clear()


def test_a_file_that_is_gone_may_come_back(write: Write, tmp_path: Path) -> None:
    file = write("t.jsonl", "{}\n")
    (tmp_path / "t.jsonl").unlink()
    with pytest.raises(TablesUnavailable, match=r"t\.jsonl"):
        JsonLines([file]).columns()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_parts_are_bounded_and_closing_closes_the_files(kind: str) -> None:
    fs = Lost()
    rows = [(i, "x" * 50_000) for i in range(1000)]
    content = "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows)
    if kind == "jsonl":
        content = lines([{"id": str(i), "text": t} for i, t in rows])
    fs.pipe(f"/bounded/t.{kind}", content.encode())
    file = DataFile.of(fs, f"/bounded/t.{kind}", "t")
    assert file is not None
    source = Csv([file]) if kind == "csv" else JsonLines([file])
    try:
        parts = source.parts(pa.schema([("id", pa.string())]), ["text"], Unreadable())
        first = next(parts)
        assert first.keys.num_rows * 50_000 <= PART_BYTES
        time.sleep(0.2)  # nothing is read ahead while nobody asks
        assert sum(each.at for each in fs.open_files[-1:]) <= 3 * PART_BYTES // 2
        before = threading.active_count()
        parts.close()
        assert all(each.closed for each in fs.open_files)
        assert threading.active_count() <= before
    finally:
        fs.rm("/bounded", recursive=True)
        fs.open_files.clear()


def test_endings_in_any_case_of_letters(write: Write) -> None:
    assert read(Csv([write("T.TSV", "id\ttext\n1\ta\n")]))[0] == {"1": "a"}
    assert read(JsonLines([write("t.NDJSON.GZ", gzip.compress(b'{"id": 1, "text": "a"}\n'))]))[0] == {1: "a"}
    assert fsspec  # the files are those of fsspec's filesystems


@pytest.mark.parametrize("block", [8, 64, 1000])
def test_blocks_of_any_size_give_the_same_records(
    write: Write, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Cells of odd signs and lengths, bad records and wrong bytes between them."""
    monkeypatch.setattr("vllm_tasks.datalayer.sources.csv_file.BLOCK", block)
    rng = random.Random(block)
    signs = ["a", ",", '"', "\n", "\r\n", "é", "🎉", " ", "\0", "x" * 50]
    wanted, bad, numbers = {}, {}, []
    file = io.BytesIO()
    file.write(b"id,text\n")
    for i in range(300):
        text = "".join(rng.choices(signs, k=rng.randrange(8)))
        kind = rng.randrange(10)
        quoted = '"' + text.replace('"', '""') + '"'
        if kind == 0:
            bad[str(i)] = f"the record {i + 2} has 3 cells, where the header has 2"
            file.write(f"{i},{quoted},\n".encode())
        elif kind == 1:
            numbers.append(i + 2)
            file.write(b',\xff,"\xfe,\n"\n')
        else:
            wanted[str(i)] = text
            file.write(f"{i},{quoted}\n".encode())
    source = Csv([write("t.csv", file.getvalue())])
    found, errors, unreadable = read(source)
    assert (found, errors) == (wanted, bad)
    assert unreadable.count == len(numbers)
    assert [e.split(": ")[0] for e in unreadable.examples] == [f"t.csv, record {n}" for n in numbers[:20]]
    assert len(sql(source, ["id"], "SELECT id FROM t")) == len(wanted)


def test_lines_of_a_txt(tmp_path: Path) -> None:
    """The way in docs/how-to/sources.md: linked as a CSV, with a delimiter that no line contains."""
    (tmp_path / "lines.txt").write_text('a, "b"\n c\n')
    (tmp_path / "lines.csv").symlink_to(tmp_path / "lines.txt")
    options = {"header": ["text"], "quote": "", "delimiter": "\x01"}
    with closing(Datalayer(url=str(tmp_path), read={"lines": options}).tables()) as tables:
        assert list(tables.read("lines")) == [[{"text": 'a, "b"'}, {"text": " c"}]]
