"""Rows of a lake for tests: a source table, outputs, and what is read back."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable, Selection, SourceRow
from vllm_tasks.errors import InvalidCall

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
