"""A lake: keys, and which rows are selected."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any

import pytest

from tests.datalayer.lake.rows import OUT, TABLE, keys, read, refusal, row, selection
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import SourceRow
from vllm_tasks.errors import InvalidCall

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
    """An id that is not a value of the key's column is named; one that is not there selects nothing."""
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
