"""Text files as sources: what is read from them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.stream import Stream

Write = Callable[..., DataFile]


def read(
    source: Csv | JsonLines, columns: Sequence[str] = ("text",), key: pa.Schema | str = "id"
) -> tuple[dict[Any, Any], dict[Any, str], Unreadable]:
    """Values by key, errors by key, and unreadable lines; a single column or key is not a tuple."""
    if isinstance(key, str):
        key = pa.schema([(key, source.key_types([key])[0])])
    found, errors, unreadable = {}, {}, Unreadable()
    for part in source.parts(key, columns, unreadable):
        keys = [k[0] if len(k) == 1 else k for k in zip(*part.keys.to_pydict().values(), strict=True)]
        lists = list(part.values(range(len(keys))))
        values = [row for rows in lists for row in rows]
        assert len(values) == len(keys)
        for i, (k, row) in enumerate(zip(keys, values, strict=True)):
            assert k not in found
            if i in part.errors:
                errors[k] = part.errors[i]
                assert row == ()
            else:
                found[k] = row[0] if len(columns) == 1 else row
    return found, errors, unreadable


def sql(source: Csv | JsonLines, columns: Sequence[str], query: str) -> list[Any]:
    with duckdb.connect() as db:
        db.register("t", Stream(source, columns))
        return db.execute(query).fetchall()


def lines(rows: Sequence[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def packed(kind: str, content: bytes) -> bytes:
    return gzip.compress(content) if kind == "gz" else pa.compress(content, "zstd", asbytes=True)
