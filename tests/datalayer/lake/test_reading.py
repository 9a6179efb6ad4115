"""A lake: what a select reads, from which files, with which values."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import json
import os
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from deltalake import write_deltalake

from tests.datalayer.lake.rows import (
    OUT,
    ROWS,
    TABLE,
    committed,
    jsonl,
    keys,
    read,
    refusal,
    row,
    selection,
    write_source,
)
from tests.eventually import LONG_ENOUGH
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.values import Nanoseconds
from vllm_tasks.errors import InvalidCall, TablesUnavailable


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
        "SELECT * FROM read_csv('/etc/passwd', all_varchar = true)",
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


@pytest.mark.parametrize("select", ["d", "d/*", "SELECT * FROM d"])
def test_a_pipe_among_the_files_is_refused(folder: Path, select: str) -> None:
    """Opening it would wait for a writer without an end."""
    write_source(folder / "d/0.csv", ROWS)
    os.mkfifo(folder / "d/1.csv")
    assert "d/1.csv' is not a file but a pipe" in refusal(Lake(str(folder)), selection(select))


def test_a_select_rounds_no_whole_number(folder: Path) -> None:
    """Whole numbers in one file and floats in another are floats in SQL; one that changes is refused."""

    def found(select: str) -> list[Any]:
        return [r.values[0] for r in read(Lake(str(folder)), selection(select, columns=("x",)))]

    write_source(folder / "d/0.parquet", [{"id": 1, "text": "a", "x": 2**53 + 1}])
    write_source(folder / "d/1.parquet", [{"id": 2, "text": "b", "x": 1.5}])
    assert found("d") == [2**53 + 1, 1.5]
    with pytest.raises(InvalidCall, match=r"'x' is int64 in one file.*name the table itself") as refused:
        found("SELECT id, x FROM d ORDER BY id")
    assert "Traceback" not in str(refused.value)
    assert keys(Lake(str(folder)), selection("SELECT id, text FROM d")) == [1, 2]
    write_source(folder / "d/0.parquet", [{"id": 1, "text": "a", "x": 7}])
    assert found("SELECT id, x FROM d ORDER BY id") == [7.0, 1.5]


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


def test_the_end_of_a_day_and_dates_before_christ(lake: Lake) -> None:
    """They are texts as PostgreSQL prints them; Arrow would take 24:00 for the begin of the day."""
    select = (
        "SELECT id, TIME '24:00:00' AS clock, TIME '00:00:00' AS begin, DATE '0044-03-15 (BC)' AS day, "
        "TIMESTAMP '0001-12-31 (BC) 23:59:59' AS at FROM t WHERE id = 1"
    )
    (found,) = read(lake, selection(select, columns=("clock", "begin", "day", "at")))
    assert found.values[:3] == ("24:00:00", dt.time(0), "0044-03-15 BC")
    assert found.values[3] == "0001-12-31 23:59:59.000000 BC"


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
    lake.close()
    thread.join(LONG_ENOUGH)
    assert not thread.is_alive()
    assert len(said) == 1
    for late in (lambda: lake.count(slow), lambda: lake.writer(selection(), TABLE)):
        with pytest.raises(TablesUnavailable, match="was closed"):
            late()
    lake.close()


@pytest.mark.parametrize(
    ("function", "way_out"),
    [
        ("read_csv('{0}/t.csv')", "set columns or all_varchar"),
        ("READ_CSV_AUTO('{0}/t.csv', types = {{'text': 'VARCHAR'}})", "set columns or all_varchar"),
        ("read_json('{0}/t.jsonl')", "set columns"),
        ("(SELECT * FROM read_ndjson('{0}/t.jsonl'))", "set columns"),
    ],
)
def test_functions_that_guess_types_are_refused(tmp_path: Path, function: str, way_out: str) -> None:
    """By DuckDB's guess, 1.50 would be 1.5."""
    message = refusal(Lake(str(tmp_path)), selection(f"SELECT * FROM {function.format(tmp_path)}"))
    assert "name the file itself" in message
    assert message.endswith(way_out)


@pytest.mark.parametrize(
    "options",
    ["all_varchar = true", "all_varchar := true", "columns = {{'id': 'VARCHAR', 'text': 'VARCHAR'}}"],
)
def test_functions_with_types_are_read(tmp_path: Path, options: str) -> None:
    """The caller has given them."""
    (tmp_path / "t.csv").write_text("id,text\n1,1.50\n")
    lake = Lake(str(tmp_path))
    select = f"SELECT * FROM read_csv('{tmp_path}/t.csv', {options.format()})"
    assert [r.values for r in read(lake, selection(select, columns=("text",)))] == [("1.50",)]
    lake.close()
