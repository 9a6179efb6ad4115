"""Outputs as Delta tables that live on: columns and properties that users change, exact partitions."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet
import pytest
from deltalake import DeltaTable, Field
from deltalake.schema import ArrayType, MapType, PrimitiveType, StructType
from pydantic import ValidationError

from tests.datalayer.lake.rows import FLAT, OUT, TABLE, committed, keys, row, selection
from vllm_tasks import VllmAPI
from vllm_tasks.datalayer.lake import delta_writer
from vllm_tasks.datalayer.lake.delta import dataset
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable
from vllm_tasks.datalayer.storable import to_json
from vllm_tasks.errors import InvalidCall


def table(lake: Lake) -> DeltaTable:
    return DeltaTable(lake.where(OUT))


def parted(*by: str, **kinds: Any) -> OutputTable:
    columns = tuple(OutputColumn(name, kind) for name, kind in kinds.items())
    return OutputTable(OUT, columns or TABLE.columns, partition_by=by)


# ---------------------------------------------------------------------- columns that users add

STRUCT = StructType([Field("x", PrimitiveType("long"), nullable=False)])
ADDED: dict[str, tuple[Any, str | None, Any]] = {
    "text": (PrimitiveType("string"), "'yes'", "yes"),
    "bytes": (PrimitiveType("binary"), "X'00ff'", b"\x00\xff"),
    "small": (PrimitiveType("byte"), "7", 7),
    "decimal": (PrimitiveType("decimal(12,3)"), "1.500", Decimal("1.500")),
    "time": (PrimitiveType("timestamp"), "TIMESTAMP '2024-01-02T03:04:05Z'", None),
    "vector": (ArrayType(PrimitiveType("double"), contains_null=False), "[0.25, -1.0]", [0.25, -1.0]),
    "map": (MapType(PrimitiveType("string"), PrimitiveType("long"), value_contains_null=True), None, None),
    "struct": (STRUCT, None, None),
}


@pytest.mark.parametrize("kind", ADDED)
def test_a_column_that_a_user_added_is_kept(lake: Lake, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs resume: new rows have NULL there, replaced rows keep the value, also after compaction."""
    type_, sql, wanted = ADDED[kind]
    name = 'my "c": ~'
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(1), row(2), row(3)], [])
    table(lake).alter.add_columns(Field(name, type_))
    if sql is not None:
        table(lake).update({f'"{name.replace(chr(34), chr(34) * 2)}"': sql})
        written = {r["id"]: r[name] for r in lake.outputs(OUT).to_pylist()}
        wanted = written[1] if wanted is None else wanted
        assert set(map(repr, written.values())) == {repr(wanted)}
    writer.commit([row(4)], [])  # by the run that was under way
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 1)
    with_more = lake.writer(selection(), TABLE)
    with_more.commit([row(2, "again"), row(5)], [(2,), (3,)])
    with_more.commit([row(5, "again")], [])
    with_more.close()
    writer.close()
    found = {r["id"]: (r["output"], r[name]) for r in lake.outputs(OUT).to_pylist()}
    assert found == {1: ("o", wanted), 2: ("again", wanted), 4: ("o", None), 5: ("again", None)}
    assert keys(lake, selection()) == [0, 3, 6, 7, 8, 9]


def test_an_added_column_beside_several_positions(lake: Lake) -> None:
    """With `flatten` a replaced row has a new number of rows, which all start with NULL."""
    lake.writer(selection(), FLAT).commit([row(1, f"a{p}", _position=p) for p in range(3)], [])
    table(lake).alter.add_columns(Field("seen", PrimitiveType("string")))
    table(lake).update({"seen": "'yes'"})
    lake.writer(selection(), FLAT).commit([row(1, "b", _position=0), row(2, "c", _position=0)], [(1,)])
    found = [(r["id"], r["output"], r["seen"]) for r in lake.outputs(OUT).to_pylist()]
    assert sorted(found, key=str) == [(1, "b", None), (2, "c", None)]


def test_columns_that_no_new_row_could_have_are_refused_by_name(lake: Lake) -> None:
    """Another shape's column is not taken for an added one."""
    lake.writer(selection(), parted(name="str", age="int")).commit([], [])
    with pytest.raises(InvalidCall, match="a column 'age' that is not wanted"):
        lake.writer(selection(), parted(name="str"))


def test_an_added_column_that_may_not_be_null(lake: Lake) -> None:
    """New rows have no value for it: refused by name, also by a run that is under way."""
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(1)], [])
    table(lake).alter.add_columns(Field("must", PrimitiveType("string"), nullable=False))
    with pytest.raises(InvalidCall, match="the added column 'must' is NOT NULL"):
        lake.writer(selection(), TABLE)
    for redo in ([], [(1,)]):
        with pytest.raises(InvalidCall, match="the added column 'must'"):
            writer.commit([row(2)], redo)


@pytest.mark.parametrize(
    "properties",
    [
        {"delta.checkpointInterval": "2"},
        {"delta.enableChangeDataFeed": "true"},
        {"delta.dataSkippingNumIndexedCols": "32"},
        {"delta.dataSkippingStatsColumns": "id,output"},
        {"delta.logRetentionDuration": "interval 1 days"},
        {"owner": "somebody else"},
    ],
)
def test_changed_properties_do_no_harm(tmp_path: Path, properties: dict[str, str]) -> None:
    """Decimal keys, whose bounds delta-rs can write wrongly, are replaced correctly."""
    pa.parquet.write_table(
        pa.table(
            {"id": pa.array([Decimal("0.10"), Decimal("-7.25")], pa.decimal128(30, 2)), "text": ["a", "b"]}
        ),
        tmp_path / "t.parquet",
    )
    lake = Lake(str(tmp_path))
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(Decimal("0.10"))], [])
    table(lake).alter.set_table_properties(properties, raise_if_not_exists=False)
    for _ in range(2):
        again = lake.writer(selection(), TABLE)
        again.commit([row(Decimal("0.10"), "again"), row(Decimal("-7.25"), "new")], [(Decimal("0.10"),)])
        again.commit([row(Decimal("-7.25"), "last")], [(Decimal("-7.25"),)])
    assert committed(lake) == [(Decimal("-7.25"), "last"), (Decimal("0.10"), "again")]
    files = pa.table(table(lake).get_add_actions(flatten=True)).to_pylist()
    assert [f.get(bound) for f in files for bound in ("min.id", "max.id")] == [None] * 2 * len(files)
    lake.close()


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"delta.appendOnly": "true"}, "delta.appendOnly"),
        ({"delta.enableDeletionVectors": "true"}, "deletion vectors"),
    ],
)
def test_properties_that_forbid_replacing_are_refused_by_name(
    lake: Lake, properties: dict[str, str], words: str
) -> None:
    """A new run is refused at once, a running one when it replaces rows; nothing is doubled."""
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(1)], [])
    table(lake).alter.set_table_properties(properties)
    for refused in (
        lambda: lake.check(selection()),
        lambda: lake.writer(selection(), TABLE),
        lambda: writer.commit([row(1, "again")], [(1,)]),
    ):
        with pytest.raises(InvalidCall, match=words):
            refused()


# ---------------------------------------------------------------------- partitions

TEXTS = [
    *(
        "a",
        "A",
        "b/c",
        "a/../b",
        "/",
        "file:///x",
        "x=y %41 é",
        " lead",
        "trail ",
        "trail.",
        "..",
        ".",
        "null",
        "NULL",
        "a%",
        "%2F",
        "+",
    ),
    *("n\nn", "\r\n", "q?#&", "\"'", "\\", "\t", "\0", "\x7f", "é", "e\u0301", "1", "01"),
    *("*[a]{b}|^`<>:;,", "\ufffe", "😀", "x" * 240, "é" * 40, "true"),
]
NO_PARTITION = ["", "__HIVE_DEFAULT_PARTITION__", "~", "a~b", "x" * 300, "é" * 60, "\ud800"]
EXACT: dict[str, list[Any]] = {
    "str": TEXTS,
    "json": [{"a": "/"}, [], "", 0, -0.5, "x%"],
    "int": [0, -1, 2**63 - 1, -(2**63)],
    "bool": [True, False],
}


def everywhere(lake: Lake, column: str) -> list[dict[int, Any]]:
    """The column by key, as our reader, delta-rs' engine and DuckDB have it, and DuckDB finds it by value."""
    whole = dataset(table(lake))
    with duckdb.connect() as con:
        con.register("o", whole)
        by_duckdb = con.sql(f'SELECT id, "{column}" FROM o').to_arrow_table()
        values = con.sql(f'SELECT DISTINCT "{column}" AS v FROM o WHERE v IS NOT NULL').fetchall()
        found = [
            pair
            for (value,) in values
            for pair in con.execute(f'SELECT id, "{column}" FROM o WHERE "{column}" = ?', [value]).fetchall()
        ]
        found += con.sql(f'SELECT id, "{column}" FROM o WHERE "{column}" IS NULL').fetchall()
    tables = (lake.outputs(OUT), pa.table(table(lake).scan().read_all()), by_duckdb)
    read = [dict(zip(t["id"].to_pylist(), t[column].to_pylist(), strict=True)) for t in tables]
    assert [t.num_rows for t in tables] == [len(r) for r in read]
    return [*read, dict(found)]


@pytest.mark.parametrize("kind", EXACT)
def test_partitions_hold_values_exactly(lake: Lake, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reader finds them after appends, replacements, compaction and reopening."""
    values = [*EXACT[kind], None]
    wanted = {i: to_json(v) if kind == "json" and v is not None else v for i, v in enumerate(values)}
    writer = lake.writer(selection(), parted("output", output=kind))
    assert [v for v in values if writer.unstorable(row(1, v))] == []
    writer.commit([row(i, v) for i, v in enumerate(values)], [])
    assert everywhere(lake, "output") == [wanted] * 4
    writer.commit([row(i, v) for i, v in enumerate(values[::-1])], [(i,) for i in wanted])
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 1)
    again = lake.writer(selection(), parted("output", output=kind))
    again.commit([row(i, v) for i, v in enumerate(values)], [(i,) for i in wanted])
    again.close()
    table(lake).create_checkpoint()
    assert everywhere(lake, "output") == [wanted] * 4
    writer.close()


def test_values_that_no_partition_holds_are_refused_for_their_row(lake: Lake) -> None:
    """Each of them, naming the column; their error rows, which have NULL there, are written."""
    writer = lake.writer(selection(), parted("output"))
    for value in NO_PARTITION:
        assert "column 'output': " in str(writer.unstorable(row(1, value)))
    assert writer.unstorable(row(1, None, _error="e" * 3000)) is None
    writer.commit([row(1, None, _error="e" * 3000), row(2, "good")], [])
    assert committed(lake)[1:] == [(2, "good")]
    assert "takes 306 bytes" in str(writer.unstorable(row(1, "x" * 299)))
    assert writer.unstorable(row(1, "x" * 248)) is None  # `output=` and 248 letters: 255 bytes
    writer.commit([row(3, "x" * 248)], [])
    assert "takes 256 bytes" in str(writer.unstorable(row(1, "x" * 249)))


KEYS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "date": (pa.date32(), [dt.date(1, 1, 1), dt.date(9999, 12, 31), dt.date(1969, 12, 31)]),
    "time": (pa.timestamp("us"), [dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999)]),
    "whole": (pa.decimal128(38, 0), [Decimal(0), Decimal(-7), Decimal(10**38 - 1)]),
    "int": (pa.int64(), [0, -1, -(2**63)]),
    "bool": (pa.bool_(), [True, False]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_as_partitions(tmp_path: Path, kind: str) -> None:
    """Keys in partitions are found, replaced and distinguished from missing ones."""
    type_, values = KEYS[kind]
    source = pa.table({"id": pa.array(values, type_), "text": ["x"] * len(values)})
    pa.parquet.write_table(source, tmp_path / "t.parquet")
    lake = Lake(str(tmp_path))
    writer = lake.writer(selection(), parted("id"))
    writer.commit([row(v) for v in values[1:]], [])
    assert keys(lake, selection()) == values[:1]
    writer.commit([row(v, "again") for v in values], [(v,) for v in values[1:]])
    assert committed(lake) == sorted((v, "again") for v in values)
    assert keys(lake, selection()) == []
    lake.close()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([Decimal("-0.05")], pa.decimal128(10, 2)), (["a"], pa.string()), ([b"a"], pa.binary())],
)
def test_keys_that_partitions_do_not_hold_are_refused(tmp_path: Path, values: list[Any], kind: Any) -> None:
    """The error names the key before anything is written."""
    pa.parquet.write_table(pa.table({"id": pa.array(values, kind), "text": ["x"]}), tmp_path / "t.parquet")
    lake = Lake(str(tmp_path))
    with pytest.raises(InvalidCall, match=r"partition_by names 'id', a column of the key, .*another column"):
        lake.writer(selection(), parted("id"))
    assert not Path(lake.where(OUT)).exists()
    lake.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datatype": "float"}, "'output': names of folders do not hold numbers with a point"),
        ({"datatype": "bytes"}, "'output': names of folders do not hold bytes"),
        ({"output_schema": {"output": "float"}}, "'output': names of folders do not hold numbers"),
        ({"by": "_seconds"}, "'_seconds': names of folders do not hold numbers"),
        ({"by": ["_error"]}, "names '_error', whose texts are too long"),
        ({"by": ["a~b"]}, "names 'a~b': delta-rs loses"),
        ({"by": ["a", "a"]}, "names a column twice"),
        ({"by": 5}, "partition_by=5 is neither"),
        ({"by": [None]}, "is neither the name of a column"),
    ],
)
def test_partitions_that_cannot_be_exact_are_refused_when_the_model_is_made(
    fields: dict[str, Any], words: str
) -> None:
    """The type may come from any option; types that a partition can hold are allowed."""
    by = fields.pop("by", ["output"])
    with pytest.raises((InvalidCall, ValidationError), match=words):
        VllmAPI(identifier="m", api_url="http://x", model_update_kwargs={"partition_by": by}, **fields)
    for good in ({"datatype": "int"}, {"datatype": "float", "predict_kwargs": {"n": 2}}, {}):
        VllmAPI(identifier="m", api_url="http://x", model_update_kwargs={"partition_by": "output"}, **good)
