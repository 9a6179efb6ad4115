"""Iceberg tables as sources: the rows of the snapshot, or a refusal with its reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from tests.datalayer.sources.columnar import LOCAL, rows, schema
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.arrow_stream import ColumnStream
from vllm_tasks.datalayer.sources.files import Files
from vllm_tasks.datalayer.sources.iceberg import Iceberg, is_iceberg
from vllm_tasks.datalayer.sources.readers import Readers
from vllm_tasks.errors import InvalidCall


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
    catalog.engine.dispose()  # a later use of the table connects anew
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


@pytest.mark.parametrize("select", ["t/data", "t/data/*.parquet", "t/**/*.parquet"])
def test_files_of_an_iceberg_table_are_not_its_rows(tmp_path: Path, changed: Any, select: str) -> None:
    with pytest.raises(InvalidCall, match="t' is an Iceberg table: name it, not the files in it"):
        Readers(Files(str(tmp_path)), {}).source(select)


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
