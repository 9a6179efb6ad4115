"""Delta tables as sources, read by delta-rs's own engine, including renamed columns and deletion vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable, QueryBuilder

from vllm_tasks.datalayer.lake.delta import filterable, quoted, refuse_outside
from vllm_tasks.datalayer.lake.delta_shape import (
    PLAIN_FEATURES,
    arrow_schema,
    beyond_plain,
    mapping_mode,
    named_feature,
)
from vllm_tasks.datalayer.sources import PART_BYTES
from vllm_tasks.datalayer.sources.arrow import ArrowSource
from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import without_secrets

READABLE = PLAIN_FEATURES | {"columnMapping", "deletionVectors", "v2Checkpoint"}
"""Reader features of Delta's protocol with which delta-rs 1.6 reads a table exactly."""
BATCH_ROWS = 8192
WIDE_BATCH_ROWS = 256
"""Rows of a batch if values may have any length; short values take twice as long as with 8,192 rows."""


def refuse_unreadable(table: DeltaTable) -> None:
    """Raise `InvalidCall` for a table with features that no reader here reads exactly, naming them."""
    features = table.protocol().reader_features or ()
    wrong = sorted(named_feature(feature) for feature in features if feature not in READABLE)
    if mapping_mode(table) == "id":
        wrong.append("column mapping by id")  # delta-rs 1.6 looks columns up by name nevertheless
    # The log escapes their bytes, and delta-rs returns the escapes.
    wrong += [f"the binary partition {name!r:.100}" for name in _partitions(table, pa.types.is_binary)]
    if wrong:
        raise InvalidCall(
            f"the Delta table {without_secrets(table.table_uri)!r} uses {', '.join(wrong)}, which delta-rs "
            "does not read; drop the feature from the table, or copy its rows into one without it"
        )
    refuse_outside(table)


def delta_reader(table: DeltaTable, columns: Sequence[str] | None = None) -> pa.RecordBatchReader:
    """The rows of the loaded version in batches, in any order: the given columns (at least one), or all.

    Raises `InvalidCall` as `refuse_unreadable`.
    """
    refuse_unreadable(table)
    schema = arrow_schema(table)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    settings = {
        "datafusion.execution.batch_size": str(_batch_rows(table, wanted)),
        "datafusion.execution.target_partitions": "1",  # each partition would hold its own files in memory
    }
    query = QueryBuilder(settings).register("source", table)
    found = query.execute(f"SELECT {', '.join(map(quoted, wanted.names))} FROM source")  # noqa: S608 - quoted
    batches = pa.RecordBatchReader.from_stream(found)
    # The engine returns text as `string_view`, a type that no other reader here returns.
    return pa.RecordBatchReader.from_batches(wanted, (batch.cast(wanted) for batch in batches))


def _batch_rows(table: DeltaTable, wanted: pa.Schema) -> int:
    """The number of rows in `PART_BYTES`, by the stored size of the widest file's rows."""
    if all(_is_short(field.type) for field in wanted):
        return BATCH_ROWS
    files = pa.table(table.get_add_actions(flatten=True))
    if not {"num_records", "size_bytes"} <= set(files.column_names):
        return WIDE_BATCH_ROWS
    known = files.filter(pc.greater(files["num_records"], 0))
    widest = pc.max(pc.divide(known["size_bytes"], known["num_records"])).as_py()
    return max(1, min(WIDE_BATCH_ROWS, PART_BYTES // max(1, widest or 1)))


def _is_short(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind))


class DeltaRows:
    """The rows for DuckDB, which requests a new stream for each query."""

    def __init__(self, table: DeltaTable) -> None:
        refuse_unreadable(table)
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return delta_reader(self._table).__arrow_c_stream__(requested_schema)


def queryable(table: DeltaTable) -> ds.Dataset | ds.Scanner | DeltaRows:
    """The table for DuckDB: through pyarrow, which reads only what a query needs, if that is exact."""
    refuse_unreadable(table)
    # Partition values are in the log: delta-rs hands -0.05 to pyarrow as 0.-5, and an empty text as NULL.
    changed = beyond_plain(table) or _partitions(table, pa.types.is_decimal) or _has_empty_partition(table)
    return DeltaRows(table) if changed else filterable(table)


def _partitions(table: DeltaTable, of: Callable[[pa.DataType], bool]) -> list[str]:
    """The columns of a type by which a table is partitioned."""
    schema = arrow_schema(table)
    return [name for name in table.metadata().partition_columns if of(schema.field(name).type)]


def _has_empty_partition(table: DeltaTable) -> bool:
    """Whether a partition by a text may be the empty text, which delta-rs lists as NULL."""
    texts = _partitions(table, pa.types.is_string)
    files = pa.table(table.get_add_actions(flatten=True)) if texts else pa.table({})
    return any(files[f"partition.{name}"].null_count for name in texts)


class DeltaSource(ArrowSource):
    """The loaded version of a Delta table as a `Source`."""

    def __init__(self, table: DeltaTable, display: str) -> None:
        """`display` is the table as text for people. Raises `InvalidCall` as `refuse_unreadable`."""
        refuse_unreadable(table)
        schema = arrow_schema(table)
        super().__init__(schema, lambda names: delta_reader(table, names or schema.names[:1]), display)
