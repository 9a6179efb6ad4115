"""Delta tables from other writers, as sources: the table's rows, or a refusal with its reason."""

from __future__ import annotations

import datetime as dt
import json
import struct
import uuid
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from tests.datalayer.lake.rows import keys, selection
from vllm_tasks.datalayer.lake.delta import dataset, find_table
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.sources import PART_BYTES, Unreadable
from vllm_tasks.datalayer.sources.delta import DeltaSource, delta_reader, queryable
from vllm_tasks.errors import InvalidCall

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
PLAIN = {"minReaderVersion": 1, "minWriterVersion": 2}
MAPPED = {"minReaderVersion": 2, "minWriterVersion": 5}


def with_features(*names: str) -> dict[str, Any]:
    return {
        "minReaderVersion": 3,
        "minWriterVersion": 7,
        "readerFeatures": list(names),
        "writerFeatures": list(names),
    }


def field(name: str, kind: Any, physical: str | None = None, number: int = 1) -> dict[str, Any]:
    mapped = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": physical}
    return {"name": name, "type": kind, "nullable": True, "metadata": mapped if physical else {}}


def write(
    folder: Path,
    files: Sequence[tuple[pa.Table, dict[str, Any]]],
    fields: list[dict[str, Any]],
    protocol: dict[str, Any] = PLAIN,
    configuration: dict[str, str] | None = None,
    partitions: Sequence[str] = (),
    **parquet: Any,
) -> DeltaTable:
    """Write a table as another writer would leave it: its log by hand, `files` with fields of their `add`."""
    (folder / "_delta_log").mkdir(parents=True)
    schema = json.dumps({"type": "struct", "fields": fields})
    metadata = {
        "id": "x",
        "format": {"provider": "parquet", "options": {}},
        "schemaString": schema,
        "partitionColumns": list(partitions),
        "configuration": configuration or {},
    }
    lines: list[dict[str, Any]] = [{"protocol": protocol}, {"metaData": metadata}]
    for i, (rows, more) in enumerate(files):
        path = folder / f"{i}.parquet"
        pq.write_table(rows, path, **parquet)
        add = {"path": path.name, "partitionValues": {}, "size": path.stat().st_size, "modificationTime": 0}
        lines.append({"add": {**add, "dataChange": True, **more}})
    (folder / "_delta_log" / f"{0:020}.json").write_text("\n".join(map(json.dumps, lines)))
    found = find_table(str(folder))
    assert found is not None
    return found


def both(table: DeltaTable) -> list[dict[str, Any]]:
    """Its rows, after a check that our reader and DuckDB agree."""
    rows = delta_reader(table).read_all()
    given: Any = queryable(table)
    other = pa.table(given) if hasattr(given, "__arrow_c_stream__") else given.to_table()
    assert other.to_pylist() == rows.to_pylist()
    assert other.schema.types == rows.schema.types
    return list(rows.to_pylist())


@pytest.mark.parametrize("protocol", [MAPPED, with_features("columnMapping")])
def test_renamed_columns(tmp_path: Path, protocol: dict[str, Any]) -> None:
    """Columns, fields within them, and partitions are found by the names that they have in the files."""
    inner = pa.struct([("c-3", pa.string()), ("c-4", pa.list_(pa.struct([("c-5", pa.int64())])))])
    values = [{"c-3": "x", "c-4": [{"c-5": 5}]}, None]
    rows = pa.table({"c-1": [1, 2], "c-2": pa.array(values, inner)})
    item = {"type": "struct", "fields": [field("q", "long", "c-5", 5)]}
    parts = [
        field("a b", "string", "c-3", 3),
        field("l", {"type": "array", "elementType": item, "containsNull": True}, "c-4", 4),
    ]
    fields = [
        field("id", "long", "c-1", 1),
        field("s", {"type": "struct", "fields": parts}, "c-2", 2),
        field('of "part"', "string", "c-6", 6),
    ]
    more = {"partitionValues": {"c-6": "x y"}}
    mode = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "6"}
    table = write(tmp_path / "t", [(rows, more)], fields, protocol, mode, ['of "part"'])
    assert both(table) == [
        {"id": 1, "s": {"a b": "x", "l": [{"q": 5}]}, 'of "part"': "x y"},
        {"id": 2, "s": None, 'of "part"': "x y"},
    ]
    with pytest.raises(InvalidCall, match="uses column mapping, which cannot be read here"):
        dataset(table)
    lake = Lake(str(tmp_path))
    assert keys(lake, selection(columns=("s", 'of "part"'))) == [1, 2]
    assert keys(lake, selection("SELECT a.* FROM t a, t b WHERE a.id > b.id", columns=("s",))) == [2]
    lake.close()


def z85(raw: bytes) -> str:
    text = ""
    for start in range(0, len(raw), 4):
        number = int.from_bytes(raw[start : start + 4].ljust(4, b"\0"), "big")
        text += "".join(Z85[number // 85**i % 85] for i in range(4, -1, -1))
    return text


def bitmap(rows: list[int]) -> bytes:
    """Delta's RoaringBitmapArray of rows below 65,536."""
    roaring = struct.pack("<IIHHI", 12346, 1, 0, len(rows) - 1, 16) + struct.pack(f"<{len(rows)}H", *rows)
    return struct.pack("<iqi", 1681511377, 1, 0) + roaring


@pytest.mark.parametrize("where", ["inline", "beside"])
def test_deleted_rows_are_not_read(tmp_path: Path, where: str) -> None:
    """Deletion vectors are applied, in the log and in files of their own."""
    raw = bitmap([1, 3])
    vector: dict[str, Any] = {"storageType": "i", "pathOrInlineDv": z85(raw)}
    if where == "beside":
        import zlib

        name = uuid.uuid4()
        framed = b"\1" + struct.pack(">i", len(raw)) + raw + struct.pack(">I", zlib.crc32(raw))
        (tmp_path / "t").mkdir()
        (tmp_path / f"t/deletion_vector_{name}.bin").write_bytes(framed)
        vector = {"storageType": "u", "pathOrInlineDv": z85(name.bytes), "offset": 1}
    vector |= {"sizeInBytes": len(raw), "cardinality": 2}
    rows = pa.table({"id": [0, 1, 2, 3, 4], "text": list("abcde")})
    table = write(
        tmp_path / "t",
        [(rows, {"deletionVector": vector, "stats": json.dumps({"numRecords": 5})})],
        [field("id", "long"), field("text", "string")],
        with_features("deletionVectors"),
        {"delta.enableDeletionVectors": "true"},
    )
    assert both(table) == [{"id": 0, "text": "a"}, {"id": 2, "text": "c"}, {"id": 4, "text": "e"}]
    lake = Lake(str(tmp_path))
    assert keys(lake, selection()) == [0, 2, 4]
    assert lake.stored("t", "count(*) AS n", "id > 0") == [{"n": 2}]
    lake.close()


def test_times_numbers_and_files_that_have_evolved(tmp_path: Path) -> None:
    """Times as Spark writes them, of any year; a file without a column; partitions as text in the log."""
    far = [dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31, 23, 59, 59, 999999)]
    table = write(
        tmp_path / "spark",
        [(pa.table({"t": pa.array(far, pa.timestamp("us"))}), {})],
        [field("t", "timestamp"), field("added", "string")],
        use_deprecated_int96_timestamps=True,
    )
    assert both(table) == [{"t": at.replace(tzinfo=dt.UTC), "added": None} for at in far]
    local = write(
        tmp_path / "local",
        [(pa.table({"t": pa.array(far, pa.timestamp("us"))}), {})],
        [field("t", "timestamp_ntz")],
        with_features("timestampNtz"),
    )
    assert both(local) == [{"t": at} for at in far]
    kinds = {"n": "decimal(10,2)", "d": "date", "s": "string", "b": "boolean", "f": "double", "none": "long"}
    values = {"n": "-0.05", "d": "0001-01-01", "s": "x/%y", "b": "true", "f": "-Infinity", "none": None}
    parted = write(
        tmp_path / "parted",
        [(pa.table({"id": [1]}), {"partitionValues": values})],
        [field("id", "long"), *(field(name, kind) for name, kind in kinds.items())],
        partitions=list(kinds),
    )
    assert both(parted) == [
        {
            "id": 1,
            "n": Decimal("-0.05"),
            "d": dt.date(1, 1, 1),
            "s": "x/%y",
            "b": True,
            "f": float("-inf"),
            "none": None,
        }
    ]


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        ("typeWidening", "type widening"),
        ("vacuumProtocolCheck", "vacuum protocol check"),
        ("variantType", "variant type"),
        ("notYetInvented", "notYetInvented"),
        ("catalogManaged", "catalog"),
        (None, "column mapping by id"),
    ],
)
def test_what_nobody_here_reads_is_refused_by_name(tmp_path: Path, feature: str | None, words: str) -> None:
    """It is refused as a permanent error, also by the lake."""
    by_id = {} if feature else {"delta.columnMapping.mode": "id", "delta.columnMapping.maxColumnId": "1"}
    protocol = with_features(feature) if feature else MAPPED
    rows = pa.table({"id": [1], "text": ["a"]})
    fields = [field("id", "long", "id"), field("text", "string", "text", 2)]
    with pytest.raises(InvalidCall, match=words):
        delta_reader(write(tmp_path / "t", [(rows, {})], fields, protocol, by_id))
    lake = Lake(str(tmp_path))
    with pytest.raises(InvalidCall, match=words):
        lake.check(selection())
    lake.close()


def test_partitions_that_the_log_cannot_tell(tmp_path: Path) -> None:
    """An empty text is the same by name and in a SELECT; bytes, which the log escapes, are refused."""
    texts = pa.table({"id": [1, 2, 3], "x": ["", "a", None]})
    write_deltalake(str(tmp_path / "t"), texts, partition_by=["x"])
    assert sorted(both(DeltaTable(str(tmp_path / "t"))), key=str) == texts.to_pylist()
    write_deltalake(str(tmp_path / "b"), pa.table({"id": [1], "x": [b"a"]}), partition_by=["x"])
    for read in (delta_reader, queryable):
        with pytest.raises(InvalidCall, match="uses the binary partition 'x', which delta-rs does not read"):
            read(DeltaTable(str(tmp_path / "b")))


def test_files_outside_of_the_table_are_not_read(tmp_path: Path) -> None:
    """A log may name any file of the machine."""
    pq.write_table(pa.table({"id": [1]}), tmp_path / "secret.parquet")
    for path in (
        f"file://{tmp_path}/secret.parquet",
        f"{tmp_path}/secret.parquet",
        "../secret.parquet",
        "..%2Fsecret.parquet",
    ):
        folder = tmp_path / str(len(path))
        table = write(folder, [(pa.table({"id": [2]}), {"path": path})], [field("id", "long")])
        for read in (delta_reader, queryable, dataset):
            with pytest.raises(InvalidCall, match="a file that is not in it"):
                read(table)


def test_a_delta_source_in_parts(tmp_path: Path) -> None:
    """Parts of bounded size hold every row with a key once, with its values; others are counted."""
    wide = "é" * 100_000
    many = pa.table(
        {"id": [*range(600), None, 2**40], "text": [f"{i}{wide}" for i in range(600)] + ["n", "m"]}
    )
    write_deltalake(str(tmp_path / "t"), many)
    source = DeltaSource(DeltaTable(str(tmp_path / "t")), "t")
    assert source.columns() == ["id", "text"]
    assert source.key_types(["id"]) == [pa.int64()]
    key = pa.schema([("id", pa.decimal128(10, 0))])  # as the outputs have it, too narrow for one
    found: dict[Any, Any] = {}
    unreadable = Unreadable()
    for part in source.parts(key, ["text", "id"], unreadable):
        wanted = list(range(0, part.count, 2))
        values = [row for rows in part.values(wanted) for row in rows]
        assert sum(len(text) for text, _ in values) < 2 * PART_BYTES
        found.update(zip(part.keys.take(pa.array(wanted, pa.int64()))["id"].to_pylist(), values, strict=True))
    assert len(found) in range(295, 306)
    assert all(value == (f"{k}{wide}", int(k)) for k, value in found.items())
    assert (unreadable.count, "1099511627776" in str(unreadable.examples)) == (2, True)
    read = pa.concat_tables(source.keys(key))["id"].to_pylist()
    assert sorted(read, key=str) == sorted([None, *map(Decimal, range(600))], key=str)
    counted = sum(part.count for part in source.parts(pa.schema([]), [], unreadable))
    assert counted == 602
