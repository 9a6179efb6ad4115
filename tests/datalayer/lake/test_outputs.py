"""A lake: outputs, their columns, folders and partitions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from deltalake import DeltaTable

from tests.datalayer.lake.rows import FLAT, OUT, ROWS, TABLE, committed, jsonl, keys, refusal, row, selection
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable
from vllm_tasks.errors import InvalidCall, TablesUnavailable


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
    start = time.process_time()
    assert "must be one SELECT" in refusal(lake, selection("/**/" * 20_000 + "drop table t"))
    assert keys(lake, selection("/* a * b */ -- c\n/**/(SELECT * FROM t)")) == list(range(10))
    assert time.process_time() - start < 5


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
        with pytest.raises(InvalidCall, match="two columns of the outputs would be named"):
            lake.writer(chosen, TABLE)
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
