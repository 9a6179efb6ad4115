"""Shards of a table: each finds and replaces its own rows exactly, and remembers no others."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.datalayer.lake.rows import TABLE, committed, read, row, selection
from vllm_tasks.datalayer.lake import delta_writer
from vllm_tasks.datalayer.lake.lake import Lake

KEYS: dict[str, list[Any]] = {
    "int": list(range(12)),
    "text": [f"a {i}" if i % 2 else f"ü{i}" for i in range(12)],
    "decimal": [Decimal(i) / 4 for i in range(-6, 6)],
    "time": [dt.datetime(2026, 1, 1, i, tzinfo=dt.UTC) for i in range(12)],
    "local time": [dt.datetime(2026, 1, 1, i, 30) for i in range(12)],
    "date": [dt.date(2026, 1, i + 1) for i in range(12)],
    "bytes": [bytes([i, 255]) for i in range(12)],
}
SHARDS = [selection(shard=(i, 3)) for i in range(3)]


@pytest.mark.parametrize("kind", KEYS)
def test_a_shard_replaces_what_others_have_written(tmp_path: Path, kind: str) -> None:
    """Keys that another writer appends, and then replaces, beside the shards: none is there twice."""
    keys = KEYS[kind]
    pa.parquet.write_table(pa.table({"id": keys, "text": ["x"] * len(keys)}), tmp_path / "t.parquet")
    lake = Lake(str(tmp_path))
    rival = lake.writer(selection(), TABLE)
    own = [[r.key[0] for r in read(lake, shard)] for shard in SHARDS]
    assert sorted(key for some in own for key in some) == sorted(keys)
    writers = [lake.writer(shard, TABLE) for shard in SHARDS]
    for text in ("first", "again"):
        rival.commit([row(key, text) for key in keys], [])
        for writer, some in zip(writers, own, strict=True):
            writer.commit([row(key, "mine") for key in some], [])
        assert committed(lake) == [(key, "mine") for key in sorted(keys)]
    assert [read(lake, shard) for shard in SHARDS] == [[], [], []]
    for writer in (rival, *writers):
        writer.close()
    lake.close()


def test_a_shard_finds_its_own_rows_among_the_done_ones_of_all(lake: Lake) -> None:
    """Rows that are done, failed and missing are found as in the whole table, also with `ids`."""
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(i, _error="bad" if i == 4 else None) for i in range(7)], [])
    for refresh, ids in (
        ("missing", None),
        ("failed", None),
        ("changed", None),
        ("missing", ((1,), (8,), (9,))),
    ):
        chosen = {"refresh": refresh, "ids": ids}
        whole = {(r.key, r.redo, r.input_hash) for r in read(lake, selection(**chosen))}
        parts = [read(lake, selection(**chosen, shard=(i, 3))) for i in range(3)]
        assert {(r.key, r.redo, r.input_hash) for part in parts for r in part} == whole
        assert sum(map(len, parts)) == len(whole) > 0
    writer.close()


def test_a_shard_remembers_no_keys_of_other_shards(lake: Lake) -> None:
    """What a writer keeps in mind grows with the rows of its shard, not with those of all shards."""
    rival, writer = lake.writer(selection(), TABLE), lake.writer(selection(shard=(1, 4)), TABLE)
    rival.commit([row(i) for i in range(4000)], [])
    own = read(lake, selection(shard=(1, 4), fingerprint="another"))[0].key[0]
    writer.commit([row(own, "mine")], [])
    ((kept,),) = writer._cursor.sql(f"SELECT count(*) FROM {delta_writer.TAKEN}").fetchall()  # type: ignore[attr-defined]
    assert 800 < kept < 1200
    assert len(committed(lake)) == 4000
    rival.close()
    writer.close()
