"""A lake: values of a select, selected rows, and outputs that hold each key exactly once."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import s3fs
from deltalake import DeltaTable, write_deltalake
from deltalake.table import TableOptimizer

from vllm_tasks.datalayer.lake import delta_writer
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable, Selection, SourceRow
from vllm_tasks.datalayer.values import Nanoseconds
from vllm_tasks.errors import InvalidCall, TablesUnavailable

OUT = "_outputs__m"
TABLE = OutputTable(OUT, (OutputColumn("output", "str"),))
FLAT = OutputTable(OUT, (OutputColumn("output", "str"),), flatten=True)
ROWS = [{"id": i, "text": f"text {i}"} for i in range(10)]


def selection(select: str = "t", **changed: Any) -> Selection:
    given: dict[str, Any] = {"key": ("id",), "columns": ("text",), "outputs": OUT, "fingerprint": "f"}
    return Selection(select, **(given | changed))


def row(key: Any, output: Any = "o", **changed: Any) -> dict[str, Any]:
    made = {
        "id": key,
        "output": output,
        "_error": None,
        "_finish_reason": "stop",
        "_prompt_tokens": 3,
        "_completion_tokens": 4,
        "_seconds": 0.5,
        "_model": "m",
        "_uuid": "u",
        "_fingerprint": "f",
        "_input_hash": f"hash of {key}",
        "_created_at": dt.datetime.now(dt.UTC),
        "_source": "t",
    }
    return made | changed


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "t.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def lake(folder: Path) -> Iterator[Lake]:
    opened = Lake(str(folder))
    yield opened
    opened.close()


def read(lake: Lake, chosen: Selection) -> list[SourceRow]:
    return [r for part in lake.rows(chosen, 3) for r in part]


def keys(lake: Lake, chosen: Selection) -> list[Any]:
    found = sorted(r.key for r in read(lake, chosen))
    assert lake.count(chosen)[1] == len(found)
    return [k[0] if len(k) == 1 else k for k in found]


def committed(lake: Lake, *columns: str) -> list[Any]:
    rows = lake.outputs(OUT).select(columns or ("id", "output")).to_pylist()
    return sorted(tuple(r.values()) for r in rows)


def refusal(lake: Lake, chosen: Selection) -> str:
    with pytest.raises(InvalidCall) as caught:
        lake.check(chosen)
    return str(caught.value)


# ---------------------------------------------------------------------- what a select reads


def write_source(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.name.endswith(".parquet"):
        pa.parquet.write_table(table, path)
    elif ".csv" in path.name:
        with path.open("wb") as raw, gzip.open(raw, "wb") if path.suffix == ".gz" else raw as file:
            pa.csv.write_csv(table, file)
    elif ".json" in path.name and "jsonl" not in path.name:
        path.write_text(json.dumps(rows))
    else:
        jsonl(path, rows)


@pytest.mark.parametrize(
    "ending", ["parquet", "jsonl", "jsonl.gz", "ndjson", "ndjson.gz", "json", "csv", "csv.gz"]
)
def test_every_format_by_name_path_glob_folder_and_select(tmp_path: Path, ending: str) -> None:
    """One file is read by its stem, its path, a glob, its folder's name, and in a SELECT, always alike."""
    write_source(tmp_path / f"sub/a [1]'s.{ending}", ROWS)
    write_source(tmp_path / f'we"ird; tâble.{ending}', ROWS)
    (tmp_path / "sub/README.md").write_text("no data")
    (tmp_path / "sub/_started").mkdir()
    (tmp_path / f"sub/_started/b.{ending}").write_text("half a file")
    lake = Lake(str(tmp_path))
    for select in (
        "sub",
        f"sub/a [1]'s.{ending}",
        "sub/*",
        "**/a*",
        f"{tmp_path}/sub/*'s.*",
        'we"ird; tâble',
        'SELECT * FROM "we""ird; tâble" -- all of it',
        "WITH x AS (SELECT * FROM sub) SELECT X.id, x.text FROM X;",
        f'SELECT * FROM "sub/a [1]\'s.{ending}"',
        "FROM 'sub/*'",
    ):
        chosen = selection(select)
        lake.check(chosen)
        # A CSV has no types: its keys are the texts in the file.
        key = str if "csv" in ending else int
        assert sorted((r.key, r.values) for r in read(lake, chosen)) == [
            ((key(r["id"]),), (r["text"],)) for r in ROWS
        ], select
        assert lake.count(chosen) == (10, 10)
    lake.close()


def test_delta_tables_and_outputs_are_sources(lake: Lake, folder: Path) -> None:
    """A Delta table is a table by its folder's name, of its last version; so are outputs."""
    write_deltalake(folder / "d", pa.Table.from_pylist(ROWS))
    write_deltalake(folder / "d", pa.Table.from_pylist(ROWS[:4]), mode="overwrite")
    assert keys(lake, selection("d")) == [0, 1, 2, 3]
    assert keys(lake, selection("SELECT d.* FROM d JOIN t USING (id) WHERE id > 1")) == [2, 3]
    with contextlib.closing(lake.writer(selection(), TABLE)) as writer:
        writer.commit([row(1), row(2)], [])
    again = selection(OUT, outputs="_outputs__n", columns=("output",))
    assert keys(lake, again) == [1, 2]
    assert "is a Delta table: name it" in refusal(lake, selection("d/*.parquet"))
    assert "is a Delta table: name it" in refusal(lake, selection("**/*.parquet"))


def test_names_that_are_not_there_or_not_clear(lake: Lake, folder: Path) -> None:
    """Unknown, ambiguous and outside names are refused, with a list of the existing ones."""
    jsonl(folder / "twice.jsonl", ROWS)
    write_source(folder / "twice.csv", ROWS)
    write_source(folder / "mixed/a.csv", ROWS)
    jsonl(folder / "mixed/b.jsonl", ROWS)
    (folder / "notes.txt").write_text("")
    (folder / "empty").mkdir()
    assert "twice.csv, twice.jsonl; give the file's complete name" in refusal(lake, selection("twice"))
    assert keys(lake, selection("twice.csv")) == [str(i) for i in range(10)]
    assert "did you mean 'twice'?; it has 'empty', 'mixed', 't', 'twice'" in refusal(lake, selection("twicf"))
    assert "no table, file or match for 'nope'; it has" in refusal(lake, selection("SELECT * FROM nope"))
    assert "several kinds (csv, jsonl)" in refusal(lake, selection("mixed"))
    assert "notes.txt' is not a supported file" in refusal(lake, selection("notes.txt"))
    assert "holds no parquet" in refusal(lake, selection("empty"))
    for outside in ("/etc/passwd", "../t", "sub/../../t", "s3://bucket/t", f"{folder}x/t"):
        assert "is not in the lake" in refusal(lake, selection(outside))
        assert "is not in the lake" in refusal(lake, selection(f"SELECT * FROM '{outside}'"))
    wrong = refusal(lake, selection(columns=("Text", "id", "nope")))
    assert "no column 'Text', 'nope'; did you mean 'text'?" in wrong
    assert "it has 'id', 'text'" in wrong


@pytest.mark.parametrize(
    "select",
    [
        "DROP TABLE t",
        "SELECT 1 AS id; SELECT 2 AS id",
        "COPY t TO '{0}/out.csv'",
        "SELECT * FROM t; COPY t TO '{0}/out.csv'",
        "INSTALL httpfs",
        "SET memory_limit = '1TB'",
        "ATTACH '{0}/x.db'",
        "PRAGMA version",
        "EXPLAIN SELECT * FROM t",
        "CREATE TABLE x AS SELECT * FROM t",
        "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('{0}/../other/secret.csv')",
        "SELECT * FROM '../other/secret.csv'",
        "WITH \"{0}/../other/secret.csv\" AS (SELECT 1) SELECT * FROM '{0}/../other/secret.csv'",
        "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
        "SELECT * FROM t) UNION ALL (SELECT * FROM t",
        "SELECT *, ? FROM t",
        "select",
        "",
        ";",
    ],
)
def test_a_select_reads_the_lake_and_does_nothing_else(tmp_path: Path, select: str) -> None:
    """Everything except one SELECT over the lake is refused, and leaves nothing behind."""
    jsonl(tmp_path / "lake/t.jsonl", ROWS)
    write_source(tmp_path / "other/secret.csv", [{"id": 1, "text": "secret"}])
    before = sorted(tmp_path.rglob("*"))
    lake = Lake(str(tmp_path / "lake"))
    message = refusal(lake, selection(select.format(tmp_path / "lake")))
    assert "secret\n" not in message
    lake.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_must_be_there_to_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is not there is refused by its absolute path, and not made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    lake = Lake("~/nowhere")
    assert f"no folder '{tmp_path}/nowhere'" in refusal(lake, selection())
    assert lake.where(OUT) == f"{tmp_path}/nowhere/{OUT}"
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InvalidCall, match="there is no folder"):
        lake.outputs(OUT)
    lake.close()


def test_files_that_cannot_be_read(folder: Path) -> None:
    """A broken file is named at the start; a bad line costs itself; a lost file may come back."""
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    (folder / "bad.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2,\n')
    lake = Lake(str(folder))
    assert str(folder / "bad.parquet") in refusal(lake, selection("bad.parquet"))
    with pytest.raises(InvalidCall, match="cannot read"):
        read(lake, selection("bad.parquet"))
    lake.check(selection("bad.jsonl"))
    assert keys(lake, selection("bad.jsonl")) == [1]
    (line,) = lake.unreadable().examples
    assert line.startswith(f"{folder}/bad.jsonl, line 2: ")
    (folder / "gone.csv").write_text("id,text\n1,a\n")
    lake.check(selection("gone"))
    (folder / "gone.csv").unlink()
    with pytest.raises(TablesUnavailable, match=r"gone\.csv"):
        read(lake, selection("gone"))
    lake.close()


def test_values_are_plain_python_values(lake: Lake) -> None:
    """Each of DuckDB's types becomes its Python type; a text in JSON that looks like a date stays text."""
    select = """SELECT 1 AS id, 1.5 AS dec, 1e300 AS f, NULL AS n, true AS b, 'é' AS s, '\\xFF'::BLOB AS bl,
        DATE '2024-02-29' AS d, TIMESTAMP '2024-02-29 12:00:00.000001' AS ts,
        TIMESTAMPTZ '2024-02-29 12:00+01' AS tz,
        TIMESTAMP_NS '2024-02-29 12:00:00.123456789' AS ns, [1, NULL] AS l, {'a': [{'b': 1}]} AS st,
        MAP {'k': 1} AS m, '{"j": [1]}'::JSON AS j, uuid '123e4567-e89b-12d3-a456-426614174000' AS u,
        DATE '19999-01-01' AS far, 170141183460469231731687303715884105727::HUGEINT // 10 AS h"""
    names = ("dec", "f", "n", "b", "s", "bl", "d", "ts", "tz", "ns", "l", "st", "m", "j", "u", "far", "h")
    (found,) = read(lake, selection(select, columns=names))
    assert dict(zip(names, found.values, strict=True)) == {
        "dec": Decimal("1.5"),
        "f": 1e300,
        "n": None,
        "b": True,
        "s": "é",
        "bl": b"\xff",
        "d": dt.date(2024, 2, 29),
        "ts": dt.datetime(2024, 2, 29, 12, 0, 0, 1),
        "tz": dt.datetime(2024, 2, 29, 11, tzinfo=dt.UTC),
        "ns": Nanoseconds.of(1709208000123456789, None),
        "l": [1, None],
        "st": {"a": [{"b": 1}]},
        "m": {"k": 1},
        "j": {"j": [1]},
        "u": "123e4567-e89b-12d3-a456-426614174000",
        "far": "19999-01-01",
        "h": 17014118346046923173168730371588410572,
    }
    assert str(found.values[names.index("ns")]) == "2024-02-29 12:00:00.123456789"


@pytest.mark.parametrize("kind", ["DATE", "TIMESTAMP", "TIMESTAMPTZ"])
def test_a_date_that_python_has_not(lake: Lake, kind: str) -> None:
    """It is a text, next to real dates; as a key it is refused by name before any row is read."""
    select = (
        f"SELECT id, if(id = 3, '19999-01-01', '2024-02-0' || (id + 1))::{kind} AS text FROM t WHERE id < 9"
    )
    dates = {r.key[0]: r.values[0] for r in read(lake, selection(select))}
    assert str(dates.pop(3)).startswith("19999-01-01")
    assert len(dates) == 8
    assert all(isinstance(date, dt.date) and date.day == i + 1 for i, date in dates.items())
    words = refusal(lake, selection(select, key=("text",), columns=("id",)))
    assert "1 rows" in words
    assert "for example text='19999-01-01" in words
    assert "CAST it to VARCHAR" in words


def test_what_looks_like_a_date_in_json_stays_text(folder: Path) -> None:
    """JSON has no dates: "2024-01-01" stays a text, and a mixed column keeps the value of each line."""
    rows = [
        {"id": "2024-01-01", "text": "2024-01-01T00:00:00Z", "mixed": 1},
        {"id": "007", "text": "12:00:00", "mixed": "one"},
    ]
    jsonl(folder / "dates.jsonl", rows)
    lake = Lake(str(folder))
    found = read(lake, selection("dates", columns=("text", "mixed")))
    assert sorted((*r.key, *r.values) for r in found) == sorted(tuple(r.values()) for r in rows)
    lake.close()


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_what_looks_like_a_uuid_in_json_stays_text(folder: Path, ending: str) -> None:
    """Text of a UUID's form keeps its capitals, also deep inside, and other text may follow it."""
    u = "123E4567-E89B-12d3-a456-426614174000"
    rows = [{"id": f"{i:08d}{u[8:]}", "text": u, "deep": {"UUID": [u], 'a "UUID"': 1}} for i in range(30_000)]
    rows += [{"id": "other", "text": "text", "deep": {"UUID": ["text"], 'a "UUID"': 2}}]
    write_source(folder / f"u.{ending}", rows)
    lake = Lake(str(folder))
    for select in ("u", "SELECT * FROM u"):
        chosen = selection(select, columns=("text", "deep"))
        lake.check(chosen)
        found = {r.key[0]: r.values for r in read(lake, chosen)}
        assert found == {r["id"]: (r["text"], r["deep"]) for r in rows}
    lake.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.csv", "id,text\n"),
        ("n.csv", ""),
        ("n.jsonl", ""),
        ("n.jsonl", "\n"),
        ("n.json", "[]"),
        ("n.json", ""),
        ("n.jsonl.gz", ""),
    ],
)
def test_a_night_without_rows(folder: Path, name: str, content: str) -> None:
    """A source without rows selects nothing, before and after a good night, and makes no outputs."""

    def night(content: str, ids: list[Any]) -> None:
        path = folder / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
        for refresh in ("missing", "changed", "all"):
            lake = Lake(str(folder))
            chosen = selection("n", refresh=refresh)
            lake.check(chosen)
            writer = lake.writer(chosen, TABLE)
            assert keys(lake, chosen) == ids
            if refresh == "all" and ids:
                writer.commit([row(i) for i in ids], [])
            writer.commit([], [])
            writer.close()
            lake.close()

    night(content, [])
    assert not (folder / OUT).exists()
    key: Any = "1" if ".csv" in name else 1
    night("id,text\n1,a\n" if ".csv" in name else '{"id": 1, "text": "a"}\n', [key])
    night(content, [])
    lake = Lake(str(folder))
    assert committed(lake) == [(key, "o")]
    lake.close()


def test_a_source_with_an_unknown_feature_or_lost_files(lake: Lake, folder: Path) -> None:
    """An unknown Delta feature is refused; a missing file counts as temporary."""
    write_deltalake(folder / "d", pa.Table.from_pylist(ROWS))
    lake.check(selection("d"))
    for file in (folder / "d").glob("*.parquet"):
        file.unlink()
    with pytest.raises(TablesUnavailable, match=r"\.parquet"):
        read(lake, selection("d"))
    write_deltalake(folder / "v", pa.Table.from_pylist(ROWS))
    protocol = {
        "minReaderVersion": 3,
        "minWriterVersion": 7,
        "readerFeatures": ["typeWidening"],
        "writerFeatures": ["typeWidening"],
    }
    (folder / f"v/_delta_log/{1:020d}.json").write_text(json.dumps({"protocol": protocol}) + "\n")
    assert "type widening" in refusal(lake, selection("v")).lower()


def test_rivals_files_that_are_lost(lake: Lake) -> None:
    """A concurrent writer's file that cannot be read is waited for, and nothing is written meanwhile."""
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    rival.commit([row(1, "rival")], [])
    (file,) = Path(lake.where(OUT)).glob("*.parquet")
    moved = file.rename(file.with_suffix(".away"))
    with pytest.raises(TablesUnavailable, match="No such file"):
        writer.commit([row(1, "mine")], [])
    moved.rename(file)
    writer.commit([row(1, "mine")], [])
    assert committed(lake) == [(1, "mine")]
    writer.close()
    rival.close()


def test_closing_while_a_thread_still_counts(folder: Path) -> None:
    """Closing ends the queries of other threads with an error, also those that come later."""
    lake = Lake(str(folder))
    slow = selection("SELECT a.range AS id, 'x' AS text FROM range(3000000) a, range(300000) b")
    said: list[BaseException] = []

    def count() -> None:
        try:
            lake.count(slow)
        except TablesUnavailable as e:
            said.append(e)

    thread = threading.Thread(target=count)
    thread.start()
    time.sleep(1)
    start = time.monotonic()
    lake.close()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - start < 5
    assert len(said) == 1
    for late in (lambda: lake.count(slow), lambda: lake.writer(selection(), TABLE)):
        with pytest.raises(TablesUnavailable, match="was closed"):
            late()
    lake.close()


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "expressions",
    [
        ["(id + 9223372036854775797)::BIGINT"],
        ["id::UTINYINT"],
        ["(id + 18446744073709551605)::UBIGINT"],
        ["sum(id)"],
        ["'key'' \"é' || id"],
        ["('123e4567-e89b-12d3-a456-42661417400' || id)::UUID"],
        ["('v' || id)::ENUM('v0', 'v1', 'v2', 'v3', 'v4', 'v5', 'v6', 'v7', 'v8', 'v9')"],
        ["DATE '1999-12-31' + id::INTEGER"],
        ["TIMESTAMP '1999-12-31 00:00:00.000001' + to_days(id::INTEGER)"],
        ["TIMESTAMPTZ '1999-12-31 00:00:00.000001+00' + to_days(id::INTEGER)"],
        ["(id / 100)::DECIMAL(5, 2)"],
        ["('a' || id)::BLOB"],
        ["id % 2 = 0", "id"],
        ["text", "id", "DATE '1999-12-31'"],
    ],
)
def test_keys_of_every_type_find_their_outputs(lake: Lake, expressions: list[str]) -> None:
    """A key of any comparable type, or several columns, is found again, redone and selected by `ids`."""
    names = tuple(f"key {i}" for i in range(len(expressions)))
    columns = ", ".join(f'{e} AS "{n}"' for e, n in zip(expressions, names, strict=True))
    chosen = selection(f"SELECT {columns}, text FROM t GROUP BY id, text", key=names)
    lake.check(chosen)
    rows = sorted(read(lake, chosen), key=lambda r: r.key)
    assert len(rows) == 10
    writer = lake.writer(chosen, TABLE)

    def out(r: SourceRow, text: str) -> dict[str, Any]:
        made = row(None, text) | dict(zip(names, r.key, strict=True))
        del made["id"]
        return made

    writer.commit([out(r, "first") for r in rows[:6]], [])
    assert {r.key for r in read(lake, chosen)} == {r.key for r in rows[6:]}
    everything = selection(chosen.select, key=names, refresh="all")
    lake.check(everything)
    assert {r.key for r in read(lake, everything) if r.redo} == {r.key for r in rows[:6]}
    writer.commit([out(r, "second") for r in rows[4:]], [r.key for r in rows[4:6]])
    assert Counter(lake.outputs(OUT)["output"].to_pylist()) == {"first": 4, "second": 6}
    some = selection(chosen.select, key=names, refresh="all", ids=(rows[1].key, rows[5].key, rows[1].key))
    assert sorted(r.key for r in read(lake, some)) == [rows[1].key, rows[5].key]
    assert lake.count(some) == (2, 2)
    writer.close()


def test_duplicate_and_null_keys_are_refused_with_their_count(
    lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    """NULL and doubled keys are counted, with an example, in one pass that is announced."""
    assert "3 rows of" in refusal(lake, selection("SELECT if(id < 3, NULL, id) AS id, text FROM t"))
    with caplog.at_level("INFO"):
        words = refusal(lake, selection("SELECT id // 4 AS id, text FROM t"))
    assert "3 keys have 10 rows, for example id=" in words
    assert "checking in one pass that id is unique in SELECT id // 4 AS id, text FROM t" in caplog.messages
    both = selection("SELECT id // 4 AS a, id % 4 AS b, text FROM t", key=("a", "b"))
    lake.check(both)
    words = refusal(lake, selection("SELECT id // 4 AS a, id % 2 AS b, text FROM t", key=("a", "b")))
    assert "a, b does not identify" in words
    for kind in ("id / 3", "[id]", "{'a': id}"):
        assert "cannot be a key" in refusal(lake, selection(f"SELECT {kind} AS id, text FROM t"))


def test_ids_of_another_type_are_refused(lake: Lake) -> None:
    """An id that is no value of the key's column is named; one that is not there selects nothing."""
    assert keys(lake, selection(ids=((3,), (99,)))) == [3]
    assert keys(lake, selection(ids=())) == []
    for wrong in (("x",), (None,), (1, 2), ("1; DROP TABLE t",)):
        with pytest.raises(InvalidCall, match="ids: "):
            read(lake, selection(ids=((1,), wrong)))


# ---------------------------------------------------------------------- which rows


def test_refresh(lake: Lake) -> None:
    """`missing`, `changed`, `failed` and `all` select their rows, and `since` leaves out rows just done."""
    start = dt.datetime.now(dt.UTC)
    writer = lake.writer(selection(), TABLE)
    old = {"_fingerprint": "old", "_input_hash": "old hash"}
    writer.commit(
        [row(0), row(1), row(2, None, _error="bad"), row(3, **old), row(4, None, _error="bad", **old)], []
    )
    found = {r.key[0]: r for r in read(lake, selection())}
    assert sorted(found) == [3, 4, 5, 6, 7, 8, 9]
    assert {k for k, r in found.items() if r.redo} == {3, 4}
    assert {r.input_hash for r in found.values()} == {None}
    changed = {r.key[0]: r.input_hash for r in read(lake, selection(refresh="changed"))}
    assert changed == dict.fromkeys(range(10)) | {i: f"hash of {i}" for i in range(3)}
    assert lake.count(selection(refresh="changed")) == (10, 10)
    assert keys(lake, selection(refresh="failed")) == [2, 4]
    assert keys(lake, selection(refresh="failed", since=start)) == [4]
    assert keys(lake, selection(refresh="failed", since=dt.datetime.now(dt.UTC))) == [2, 4]
    assert keys(lake, selection(refresh="all")) == list(range(10))
    assert keys(lake, selection(refresh="all", since=start)) == list(range(3, 10))
    assert lake.count(selection(ids=((0,), (3,), (5,)))) == (3, 2)
    for refresh in ("missing", "changed", "failed", "all"):
        fresh = selection(refresh=refresh, outputs="_outputs__none", since=start)
        assert len(read(lake, fresh)) == (0 if refresh == "failed" else 10)
    writer.close()


def test_rows_stream_and_can_be_left(lake: Lake) -> None:
    """Lists have at most `size` rows, and the lake stays usable if a stream is closed half-way."""
    big = selection("SELECT id, 'text' AS text FROM range(300000) r(id)")
    stream = lake.rows(big, 100)
    assert len(next(stream)) == 100
    other = lake.rows(big, 7)
    assert len(next(other)) == 7
    stream.close()
    other.close()
    assert lake.count(big) == (300_000, 300_000)
    assert sum(len(part) for part in lake.rows(big, 5000)) == 300_000


# ---------------------------------------------------------------------- outputs


def test_columns_have_their_types(lake: Lake) -> None:
    """Each kind of output has its own type, NULL or not, and a value that does not fit is named."""
    kinds = ("str", "int", "float", "bool", "bytes", "json")
    table = OutputTable(OUT, tuple(OutputColumn(f'my "{k}"', k) for k in kinds), flatten=True)
    values = {
        "str": "é\n",
        "int": -(2**63),
        "float": 0.1,
        "bool": False,
        "bytes": b"\0",
        "json": {"a": ["é"]},
    }
    writer = lake.writer(selection(), table)

    def out(key: int, position: int | None, **given: Any) -> dict[str, Any]:
        made = row(key) | {f'my "{k}"': given.get(k) for k in kinds} | {"_position": position}
        del made["output"]
        return made

    writer.commit([out(1, 0, **values), out(1, 1), out(2, None, json=[])], [])
    found = lake.outputs(OUT).sort_by([("id", "ascending"), ("_position", "ascending")])
    assert [str(t) for t in found.schema.types[:8]] == (
        ["int64", "string", "int64", "double", "bool", "binary", "string", "int64"]
    )
    assert found.schema.field("_created_at").type == pa.timestamp("us", "UTC")
    first, second, third = found.to_pylist()
    assert {k: first[f'my "{k}"'] for k in kinds} == values | {"json": '{"a": ["é"]}'}
    assert all(second[f'my "{k}"'] is None for k in kinds)
    assert (third['my "json"'], third["_position"]) == ("[]", None)
    for kind, wrong in {"int": 2**63, "str": "\ud800", "json": float("nan"), "bool": "x", "bytes": 1}.items():
        with pytest.raises(ValueError, match=f'column .my "{kind}"'):
            writer.commit([out(3, 0, **{kind: wrong})], [])
        assert f"column 'my \"{kind}\"'" in str(writer.unstorable(out(3, 0, **{kind: wrong})))
    for wrong_key in (None, "x", 2**63):
        assert "column 'id'" in str(writer.unstorable(out(3, 0) | {"id": wrong_key}))
    assert writer.unstorable(out(3, 0, **values)) is None
    assert writer.unstorable(out(3, 0, json={"big": 2**70}, float=7)) is None
    assert lake.outputs(OUT).num_rows == 3
    writer.close()


@pytest.mark.parametrize("name", ["a é b", "50% #1?", 'it\'s "x"; *'])
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    """Outputs are written to and read from folders with spaces, quotes and signs in their names."""
    jsonl(tmp_path / name / "t.jsonl", ROWS)
    lake = Lake(str(tmp_path / name))
    for partition_by in ((), ("_model",)):
        chosen = selection(outputs=f"_outputs__{name} {len(partition_by)}")
        writer = lake.writer(chosen, OutputTable(chosen.outputs, TABLE.columns, partition_by=partition_by))
        writer.commit([row(1), row(2)], [])
        writer.commit([row(2, "again")], [(2,)])
        writer.close()
        lake.check(chosen)
        assert keys(lake, chosen) == [0, *range(3, 10)]
        assert sorted(lake.outputs(chosen.outputs)["output"].to_pylist()) == ["again", "o"]
        assert keys(
            lake, selection(f'FROM "{chosen.outputs.replace(chr(34), chr(34) * 2)}"', columns=())
        ) == [
            1,
            2,
        ]
    with pytest.raises(InvalidCall, match="because of the '\\['"):
        lake.writer(selection(), OutputTable("_outputs__a[1]", TABLE.columns))
    lake.close()


@pytest.mark.parametrize("sign", ["#", "?", "%41", "\n"])
def test_names_that_a_url_does_not_hold(bucket: str, sign: str) -> None:
    """A name that delta-rs would shorten on an object store, so that two tables become one, is refused."""
    lake = Lake(bucket)
    with pytest.raises(InvalidCall, match=r"a Delta table cannot be in .* give another predict_id"):
        lake.outputs(f"a{sign}1")
    lake.close()


def test_a_folder_with_files_is_not_taken_for_outputs(lake: Lake, folder: Path, bucket: str) -> None:
    """Outputs never go among files of the user's, which cleaning up would remove; nor outside the lake."""
    (folder / OUT).mkdir()
    (folder / OUT / "notes.txt").write_text("mine")
    with pytest.raises(InvalidCall, match=r"is no Delta table but has files, for example 'notes.txt'"):
        lake.writer(selection(), TABLE)
    assert [p.name for p in (folder / OUT).iterdir()] == ["notes.txt"]
    (folder / OUT / "notes.txt").unlink()
    lake.writer(selection(), TABLE).close()
    for name in ("../x", "a/b", "a\\b", "..", ""):
        with pytest.raises(InvalidCall, match="is no name of a table"):
            lake.writer(selection(outputs=name), OutputTable(name, TABLE.columns))
        with pytest.raises(InvalidCall, match="is no name of a table"):
            lake.outputs(name)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.pipe(f"{bucket}3/t.csv", b"id,text\n1,a\n")
    fs.pipe(f"{bucket}3/{OUT}/notes.txt", b"mine")
    remote = Lake(f"{bucket}3")
    with pytest.raises(InvalidCall, match=r"has files, for example 'notes.txt'"):
        remote.writer(selection(), TABLE)
    remote.close()


def test_a_path_that_looks_like_a_url_and_a_url_with_a_password(tmp_path: Path) -> None:
    """A path without a scheme is used as it is; a password in a URL is never rendered."""
    jsonl(tmp_path / "a::b@c/t.jsonl", ROWS)
    lake = Lake(str(tmp_path / "a::b@c"))
    assert keys(lake, selection()) == list(range(10))
    assert lake.where(OUT) == f"{tmp_path}/a::b@c/{OUT}"
    lake.close()
    lake = Lake("http://u:secret@127.0.0.1:9/x")
    assert lake.where(OUT) == f"http://127.0.0.1:9/x/{OUT}"
    with pytest.raises((InvalidCall, TablesUnavailable)) as caught:
        lake.check(selection())
    assert "secret" not in str(caught.value)
    with pytest.raises((InvalidCall, TablesUnavailable)) as caught:
        lake.outputs(OUT)
    assert "secret" not in str(caught.value)
    lake.close()


def test_many_comments_before_no_statement(lake: Lake) -> None:
    """A statement is recognised in linear time."""
    start = time.monotonic()
    assert "must be one SELECT" in refusal(lake, selection("/**/" * 20_000 + "drop table t"))
    assert keys(lake, selection("/* a * b */ -- c\n/**/(SELECT * FROM t)")) == list(range(10))
    assert time.monotonic() - start < 5


def test_redo_takes_all_positions_of_a_key(lake: Lake) -> None:
    """A redone row's old positions go with it in one transaction, and a key is selected once."""
    writer = lake.writer(selection(), FLAT)
    writer.commit([row(1, f"a{p}", _position=p) for p in range(5)] + [row(2, "b", _position=None)], [])
    assert keys(lake, selection(refresh="all")) == list(range(10))
    versions = DeltaTable(lake.where(OUT)).version()
    writer.commit(
        [row(1, "c0", _position=0), row(2, "d0", _position=0), row(2, "d1", _position=1)], [(1,), (2,)]
    )
    assert committed(lake, "id", "_position", "output") == [(1, 0, "c0"), (2, 0, "d0"), (2, 1, "d1")]
    assert DeltaTable(lake.where(OUT)).version() == versions + 1
    writer.close()


def test_a_table_of_another_shape_is_refused(lake: Lake) -> None:
    """Outputs with other columns, types or partitions are not written to; the way out is named."""
    lake.writer(selection(), TABLE).close()
    lake.writer(selection(), TABLE).close()
    others = {
        "no column 'x'": OutputTable(OUT, (OutputColumn("output", "str"), OutputColumn("x", "int"))),
        "a column 'output' that is not wanted": OutputTable(OUT, ()),
        "'output' is string, not int64": OutputTable(OUT, (OutputColumn("output", "int"),)),
        "'output' is string, not json": OutputTable(OUT, (OutputColumn("output", "json"),)),
        "no column '_position'": FLAT,
        "partitioned by": OutputTable(OUT, TABLE.columns, partition_by=("_model",)),
    }
    for words, table in others.items():
        with pytest.raises(InvalidCall, match=f"{words}.*another predict_id"):
            lake.writer(selection(), table)
    text_keys = selection("SELECT id::VARCHAR AS id, text FROM t")
    with pytest.raises(InvalidCall, match=r"'id' is int64, not string.*another predict_id"):
        lake.writer(text_keys, TABLE)
    assert "'id' is int64, not string" in refusal(lake, text_keys)


def test_names_that_collide_and_arguments_that_are_wrong(lake: Lake) -> None:
    """A key named like another column of the outputs is refused, and unknown codecs and partitions."""
    for name in ("output", "OUTPUT", "_error", "_position"):
        chosen = selection(f'SELECT id AS "{name}", text FROM t', key=(name,))
        with pytest.raises(InvalidCall, match="two columns of the outputs would be named"):
            lake.writer(chosen, FLAT)
    with pytest.raises(InvalidCall, match="compression='rar' is not one of uncompressed, snappy"):
        lake.writer(selection(), OutputTable(OUT, TABLE.columns, compression="rar"))
    with pytest.raises(InvalidCall, match=r"partition_by names \['nope'\]"):
        lake.writer(selection(), OutputTable(OUT, TABLE.columns, partition_by=("nope",)))
    assert not Path(lake.where(OUT)).exists()


def test_a_text_key_is_no_partition(lake: Lake) -> None:
    """'' would become NULL there, and bytes never match."""
    for kind in ("VARCHAR", "BLOB"):
        chosen = selection(f"SELECT id::VARCHAR::{kind} AS id, text FROM t")
        with pytest.raises(InvalidCall, match="partition_by names 'id', a column of the key"):
            lake.writer(chosen, OutputTable(OUT, TABLE.columns, partition_by=("id",)))
    assert not Path(lake.where(OUT)).exists()


@pytest.mark.parametrize("partition", ["_model", "id"])
def test_partitions(lake: Lake, partition: str) -> None:
    """A partitioned table is read, redone and selected from like any other."""
    table = OutputTable(OUT, TABLE.columns, partition_by=(partition,), compression="snappy")
    writer = lake.writer(selection(), table)
    writer.commit([row(i, _model=f"a/b {i % 2}") for i in range(4)], [])
    rival = lake.writer(selection(), table)
    rival.commit([row(4, "rival", _model="a/b 0"), row(1, "rival", _model=None)], [(1,)])
    writer.commit([row(4, "redo", _model="a/b 1"), row(3, "redo", _model="a/b 0")], [(3,)])
    assert committed(lake) == [(0, "o"), (1, "rival"), (2, "o"), (3, "redo"), (4, "redo")]
    assert keys(lake, selection()) == [5, 6, 7, 8, 9]
    writer.close()
    rival.close()


# ---------------------------------------------------------------------- rivals, crashes, full disks


@pytest.mark.parametrize("ids", [(0, 0), (0, 1)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_rival_beside_a_compaction(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, moment: str, ids: tuple[int, int]
) -> None:
    """A concurrent commit right before or after a compaction, of one file or of two, is replaced."""
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    compact = TableOptimizer.compact

    def beside(self: TableOptimizer, **given: Any) -> Any:
        if moment == "before":
            rival.commit([row(100, "rival")], [])
        done = compact(self, **given)
        if moment == "after":
            rival.commit([row(100, "rival")], [])
            self.table.update_incremental()  # the last that `compact` does itself
        return done

    with monkeypatch.context() as patch:
        patch.setattr(delta_writer, "COMPACT_EVERY", 2)
        patch.setattr(delta_writer, "SMALL_FILES", 1)
        patch.setattr(TableOptimizer, "compact", beside)
        for i in ids:
            writer.commit([row(i)], [])
    writer.commit([row(100, "mine")], [])
    assert committed(lake) == [*((i, "o") for i in sorted(set(ids))), (100, "mine")]
    writer.close()
    rival.close()


def test_keys_that_a_rival_wrote_are_replaced_however_long_ago(lake: Lake) -> None:
    """The last commit wins completely, also if this writer has committed other keys since the other one's."""
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    rival.commit([row(1, "rival"), row(2, "rival")], [])
    writer.commit([row(5, "mine")], [])
    writer.commit([row(6, "mine")], [])
    writer.commit([row(1, "mine")], [])
    rival.commit([row(5, "rival"), row(1, "rival again")], [(1,)])
    writer.commit([row(2, "mine")], [])
    assert committed(lake) == [(1, "rival again"), (2, "mine"), (5, "rival"), (6, "mine")]
    writer.close()
    rival.close()


def test_a_commit_repeated_after_a_lost_acknowledgement(lake: Lake) -> None:
    """The same call again, from a writer that does not know of its success, changes nothing."""
    writer = lake.writer(selection(), FLAT)
    blind = lake.writer(selection(), FLAT)
    call = ([row(1, "a", _position=0), row(1, "b", _position=1), row(2, "c", _position=0)], [])
    writer.commit(*call)
    blind.commit(*call)
    assert committed(lake) == [(1, "a"), (1, "b"), (2, "c")]
    writer.close()
    blind.close()


@pytest.mark.parametrize("table", [TABLE, FLAT])
def test_one_writer_that_commits_a_key_again(lake: Lake, table: OutputTable) -> None:
    """A commit repeated on the same writer, now or much later, replaces itself for any `redo`."""
    writer = lake.writer(selection(), table)
    positions = (0, 1) if table.flatten else (None,)

    def call(*ids: int, text: str = "o") -> list[dict[str, Any]]:
        return [row(i, text) | ({"_position": p} if table.flatten else {}) for i in ids for p in positions]

    for _ in range(3):
        writer.commit(call(1, 2), [])
    writer.commit(call(3), [(3,)])
    writer.commit(call(3), [(3,)])
    writer.commit(call(1, 4, text="again"), [])
    wanted = [(1, "again"), (2, "o"), (3, "o"), (4, "again")]
    assert committed(lake) == sorted(wanted * len(positions))
    writer.close()


def test_a_key_twice_in_one_commit(lake: Lake) -> None:
    """If a source gives a key twice, its later output is kept completely."""
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(1, "a"), row(2, "b"), row(1, "c")], [])
    writer.commit([row(2, "d"), row(2, "e"), row(3, "f")], [(2,)])
    assert committed(lake) == [(1, "c"), (2, "e"), (3, "f")]
    writer.close()
    flat = lake.writer(selection(outputs="flat"), OutputTable("flat", FLAT.columns, flatten=True))
    flat.commit([row(1, f"a{p}", _position=p) for p in (0, 1, 2)] + [row(1, "b", _position=None)], [])
    assert lake.outputs("flat").select(["id", "output"]).to_pylist() == [{"id": 1, "output": "b"}]
    flat.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_write(lake: Lake, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C right before or after rows are written: the same call again leaves each key once."""
    writer = lake.writer(selection(), TABLE)
    write = delta_writer.write_deltalake

    def interrupted(*given: Any, **named: Any) -> None:
        if moment == "after":
            write(*given, **named)
        raise KeyboardInterrupt

    for ids in ((1, 2), (3,)):
        with monkeypatch.context() as patch:
            patch.setattr(delta_writer, "write_deltalake", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.commit([row(i) for i in ids], [])
        writer.commit([row(i, "again") for i in ids], [])
    assert committed(lake) == [(1, "again"), (2, "again"), (3, "again")]
    writer.close()


def test_a_compaction_that_fails(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that are written stay acknowledged when tidying up fails, in a commit and at the end."""
    monkeypatch.setattr(delta_writer, "COMPACT_EVERY", 3)
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 2)

    def fails(self: Any, **_: Any) -> None:
        raise OSError("No space left on device")

    writer = lake.writer(selection(), TABLE)
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(TableOptimizer, "compact", fails)
        for i in range(3):
            writer.commit([row(i)], [])
        assert "were not compacted: No space left" in caplog.text
        caplog.clear()
        writer.close()
        assert "were not compacted: No space left" in caplog.text
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(3)], [])
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(DeltaTable, "vacuum", fails)
        writer.close()
    assert "were not removed: No space left" in caplog.text
    assert committed(lake) == [(i, "o") for i in range(4)]


RIVAL = """
import random, sys
from tests.datalayer.test_lake import FLAT, OUT, Lake, row, selection
folder, name, seed = sys.argv[1:]
lake = Lake(folder)
chosen = selection(fingerprint=name, refresh="missing")
writer = lake.writer(chosen, FLAT)
print("ready", flush=True)
sys.stdin.readline()
random.seed(int(seed))
rows = [r for part in lake.rows(chosen, 7) for r in part]
random.shuffle(rows)
for start in range(0, len(rows), 3):
    group = rows[start:start + 3]
    writer.commit(
        [row(r.key[0], name, _position=p, _fingerprint=name) for r in group for p in range(2)],
        [r.key for r in group if r.redo],
    )
    print(*(r.key[0] for r in group), flush=True)
writer.close()
lake.close()
"""


def start_rival(folder: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RIVAL, folder, name, "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def exactly_once(lake: Lake, wanted: set[int]) -> None:
    """Each key has the two positions of one and the same writer."""
    found: dict[int, list[Any]] = {}
    for r in lake.outputs(OUT).to_pylist():
        found.setdefault(r["id"], []).append((r["output"], r["_position"]))
    assert set(found) == wanted
    for positions in found.values():
        assert sorted(positions) == [(positions[0][0], 0), (positions[0][0], 1)]


def go(rivals: list[subprocess.Popen[str]]) -> None:
    for rival in rivals:
        assert rival.stdout
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin
        rival.stdin.write("go\n")
        rival.stdin.flush()


def run_rivals(rivals: list[subprocess.Popen[str]]) -> None:
    go(rivals)
    for rival in rivals:
        rival.communicate(timeout=60)
        assert rival.returncode == 0


def test_four_processes_that_write_the_same_keys(lake: Lake, folder: Path) -> None:
    """Every key is there exactly once, with all positions of one writer, and no writer fails."""
    jsonl(folder / "t.jsonl", [{"id": i, "text": ""} for i in range(60)])
    run_rivals([start_rival(str(folder), name) for name in "abcd"])
    exactly_once(lake, set(range(60)))


def test_a_killed_writer_loses_nothing_committed(lake: Lake, folder: Path) -> None:
    """SIGKILL at any moment leaves complete commits; the next writers resume, and each key is there once."""
    jsonl(folder / "t.jsonl", [{"id": i, "text": ""} for i in range(120)])
    acknowledged: set[int] = set()
    *killed, last = [start_rival(str(folder), "f") for _ in range(4)]
    for process in killed:
        go([process])
        time.sleep(random.uniform(0.05, 0.5))
        process.kill()
        lines, _ = process.communicate()
        acknowledged |= {int(word) for word in lines.split()}
        there = set(lake.outputs(OUT)["id"].to_pylist())
        assert acknowledged <= there
        exactly_once(lake, there)
        assert set(keys(lake, selection())) == set(range(120)) - there
    run_rivals([last])
    exactly_once(lake, set(range(120)))


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is `TablesUnavailable`, nothing partial is visible, and later the same call succeeds."""
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    lake = Lake(str(tmp_path))
    try:
        jsonl(tmp_path / "t.jsonl", ROWS)
        writer = lake.writer(selection(), TABLE)
        writer.commit([row(1)], [])
        filler = tmp_path / "filler"
        filler.write_bytes(b"0" * 300_000)
        noise = random.Random(1).randbytes(60_000).hex()
        for redo in ([], [(1,)]):
            with pytest.raises(TablesUnavailable, match="No space left"):
                writer.commit([row(1 if redo else 2, noise)], redo)
            assert committed(lake) == [(1, "o")]
        filler.unlink()
        for orphan in Path(lake.where(OUT)).glob("*.tmp"):
            orphan.unlink()
        writer.commit([row(1, noise), row(2, "two")], [(1,)])
        assert committed(lake) == [(1, noise), (2, "two")]
        writer.commit([row(3, "three")], [])
        monkeypatch.setattr(delta_writer, "SMALL_FILES", 1)
        free = os.statvfs(tmp_path)
        filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - 30_000))
        writer.close()
        assert "were not compacted" in caplog.text
        assert committed(lake) == [(1, noise), (2, "two"), (3, "three")]
    finally:
        lake.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_compaction_keeps_contents_and_rivals_go_on(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small files become few next to a concurrent writer and a reader; nothing is lost or doubled."""
    monkeypatch.setattr(delta_writer, "COMPACT_EVERY", 30)
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 20)
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    rival.commit([row(1000, "rival")], [])
    for i in range(95):
        writer.commit([row(i, f"o{i}")], [])
        if i == 50:
            snapshot = DeltaTable(lake.where(OUT)).to_pyarrow_dataset()
    rival.commit([row(3, "rival"), row(1001, "rival")], [])
    writer.commit([row(1000, "mine")], [])
    writer.close()
    rival.close()
    files = DeltaTable(lake.where(OUT)).file_uris()
    assert len(files) < 25
    mine = {i: f"o{i}" for i in range(95)}
    assert dict(committed(lake)) == mine | {3: "rival", 1000: "mine", 1001: "rival"}
    assert lake.outputs(OUT).num_rows == 97
    assert snapshot.count_rows() == 52
    assert any(Path(lake.where(OUT), "_delta_log").glob("*.json"))


def test_the_temporary_folder_goes_with_the_lake(folder: Path, tmp_path: Path) -> None:
    """Closing leaves no file where queries spill to."""
    lake = Lake(str(folder))
    spill = lake.workspace._folder.path
    lake.check(selection("SELECT id, text FROM (SELECT hash(x) AS id, x AS text FROM range(12000000) r(x))"))
    assert any(spill.iterdir())
    lake.close()
    assert not spill.exists()
    with pytest.raises(TablesUnavailable, match="was closed"):
        lake.check(selection())


# ---------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as env:
            env.setenv("AWS_ACCESS_KEY_ID", "key")
            env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            env.setenv("AWS_REGION", "us-east-1")
            env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield "s3://bucket/lake"
    finally:
        server.kill()
        server.wait()


def test_an_object_store(bucket: str, tmp_path: Path) -> None:
    """Over S3 every format is read, and outputs are written, found, replaced and reconciled."""
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for ending in ("parquet", "jsonl.gz", "csv"):
        write_source(tmp_path / f"x.{ending}", ROWS)
        fs.pipe(f"{bucket}/{ending[:3]} (x'.{ending}", (tmp_path / f"x.{ending}").read_bytes())
    lake = Lake(bucket)
    for select in ("par (x'", "jso (x'.jsonl.gz", "*.csv", 'SELECT * FROM "par (x\'"'):
        lake.check(selection(select))
        assert keys(lake, selection(select)) == [str(i) if "csv" in select else i for i in range(10)]
    chosen = selection("par (x'")
    writer, rival = lake.writer(chosen, TABLE), lake.writer(chosen, TABLE)
    writer.commit([row(i) for i in range(5)], [])
    rival.commit([row(4, "rival"), row(5, "rival")], [])
    writer.commit([row(5, "mine"), row(0, "redone")], [(0,)])
    assert committed(lake) == [(0, "redone"), (1, "o"), (2, "o"), (3, "o"), (4, "rival"), (5, "mine")]
    assert keys(lake, chosen) == [6, 7, 8, 9]
    assert lake.where(OUT) == f"{bucket}/{OUT}"
    assert "it has '_outputs__m', \"csv (x'\"" in refusal(lake, selection("nope"))
    with pytest.raises(InvalidCall, match="cannot read"):
        lake.check(selection("SELECT * FROM read_text('s3://other/x')"))
    writer.close()
    rival.close()
    lake.close()


def test_tables_that_are_put_on_an_object_store(bucket: str) -> None:
    """Tables are created, replaced by key, and read by name in a SELECT that filters by text."""
    lake = Lake(f"{bucket}-new")
    assert not lake.has("scores")
    for score in (0.5, 1.5):
        rows = [{"run": run, "score": score} for run in ("a", "b")]
        lake.put("scores", pa.Table.from_pylist(rows), ["run"])
    assert lake.has("scores")
    found = list(lake.read("""SELECT "score" FROM "scores" WHERE "run" = 'b'"""))
    assert found == [[{"score": 1.5}]]
    lake.close()


def test_rival_processes_on_an_object_store(bucket: str) -> None:
    """Two processes that write the same keys over S3 are reconciled, too."""
    s3fs.S3FileSystem(skip_instance_cache=True).pipe(
        f"{bucket}2/t.jsonl", "".join(f'{{"id": {i}, "text": "x"}}\n' for i in range(12)).encode()
    )
    run_rivals([start_rival(f"{bucket}2", name) for name in "ab"])
    lake = Lake(f"{bucket}2")
    exactly_once(lake, set(range(12)))
    lake.close()


def test_an_object_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that does not respond counts as temporary; a missing bucket does not."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    lake = Lake("s3://bucket/lake")
    with pytest.raises(TablesUnavailable, match="cannot"):
        lake.outputs(OUT)
    with pytest.raises(TablesUnavailable, match="cannot list"):
        lake.check(selection())
    lake.close()
