"""Columnar files as sources: what is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from vllm_tasks.datalayer.sources import Part, Source, Unreadable
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.parquet import Parquet

LOCAL = fsspec.filesystem("file")


NASTY = ["", " a ", "NULL", "12.50", '{"a": 1}', "Zoë\n😀", "x" * 3000, None]


def files(*paths: Path) -> list[DataFile]:
    found = [DataFile.of(LOCAL, str(path), path.name) for path in paths]
    return [file for file in found if file is not None]


def schema(source: Source, key: Sequence[str]) -> pa.Schema:
    return pa.schema(list(zip(key, source.key_types(key), strict=True)))


def parts(
    source: Source, columns: Sequence[str], *key: str, unreadable: Unreadable | None = None
) -> list[Part]:
    """Parts whose values are never read."""
    return list(source.parts(schema(source, key or ("id",)), columns, unreadable or Unreadable()))


def rows(source: Source, *columns: str, key: Sequence[str] = ("id",)) -> list[tuple[Any, ...]]:
    """All rows, in the way a run reads them."""
    found = []
    for part in source.parts(schema(source, key), columns, Unreadable()):
        for some in part.values(range(part.keys.num_rows)):
            found += some
    return found


def written(path: Path, table: Any, **options: Any) -> Parquet:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return Parquet(files(path))
