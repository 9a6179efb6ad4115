"""The shape of a Delta table to write to: the columns it must have, and those that users added."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from deltalake import DeltaTable

from vllm_tasks.datalayer.lake.partitions import LOST, OTHER_COLUMN
from vllm_tasks.datalayer.selection import OWN_COLUMNS
from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import without_secrets

PLAIN_FEATURES = {"timestampNtz"}
"""Reader features that leave the rows of a file as they are in the table."""
FILLED_BY_DELTA = ("delta.generationExpression", "delta.identity")
"""Prefixes in the metadata of a column whose values delta-rs would have to generate, and cannot."""
BEHIND = "_created_at"
"""The last of our columns that outputs of every version have."""


def arrow_schema(table: DeltaTable) -> pa.Schema:
    """The table's schema in pyarrow's types."""
    return pa.schema(table.schema())


def added_columns(there: Sequence[str]) -> list[str]:
    """The columns that users added to outputs with the columns `there`: those after `BEHIND`.

    Unknown columns before it belong to another shape, such as that of an earlier `output_schema`.
    """
    behind = there[there.index(BEHIND) + 1 :] if BEHIND in there else ()
    return [name for name in behind if name not in OWN_COLUMNS]


def beyond_plain(table: DeltaTable) -> list[str]:
    """Names of the Delta features with which the table's files alone are not its rows."""
    features = set(table.protocol().reader_features or ())
    if mapping_mode(table) is not None:
        features.add("columnMapping")
    return sorted(named_feature(feature) for feature in features - PLAIN_FEATURES)


def mapping_mode(table: DeltaTable) -> str | None:
    """How columns are mapped to those in files, `name` or `id`; None if they have the same names."""
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    return None if mode == "none" else mode


def named_feature(feature: str) -> str:
    """A feature of Delta's protocol in plain words: `deletionVectors` are deletion vectors."""
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in feature)
    return words.strip()


def refuse_unwritable(table: DeltaTable, way_out: str) -> None:
    """Raise `InvalidCall` for a table that was changed so that its rows cannot be replaced."""
    display = without_secrets(table.table_uri)
    if used := beyond_plain(table):
        raise InvalidCall(
            f"the table {display!r} uses {', '.join(used)}, with which delta-rs cannot replace rows exactly; "
            f"drop the feature from the table, or {way_out}"
        )
    if table.metadata().configuration.get("delta.appendOnly", "").lower() == "true":
        raise InvalidCall(
            f"the table {display!r} has the property delta.appendOnly, with which no row can be replaced; "
            f"set it to false, or {way_out}"
        )
    for field in table.schema().fields:
        if any(name.startswith(FILLED_BY_DELTA) for name in field.metadata):
            raise InvalidCall(
                f"the column {field.name!r} of the table {display!r} is generated, which delta-rs "
                f"cannot write; drop it, or {way_out}"
            )


def refuse_partitions(schema: pa.Schema, keys: int, partition_by: Sequence[str]) -> None:
    """Raise `InvalidCall` unless the columns exist and have types that partitions hold exactly.

    The first `keys` columns of the schema are the key's.
    """
    if strange := set(partition_by) - set(schema.names):
        raise InvalidCall(
            f"partition_by names {sorted(strange)}, the outputs have {', '.join(map(repr, schema.names))}"
        )
    for name in partition_by:
        in_key = name in schema.names[:keys]
        if why := _inexact(name, schema.field(name).type, in_key):
            raise InvalidCall(
                f"partition_by names {name!r}, {'a column of the key, ' * in_key}{why}; {OTHER_COLUMN}"
            )


def _inexact(name: str, kind: pa.DataType, in_key: bool) -> str | None:
    if name == "_error":
        return "whose texts are too long for names of folders"
    if LOST in name:
        return "and delta-rs loses files of a partition with a ~"
    if in_key and pa.types.is_string(kind):
        # A row whose output no partition can hold becomes an error row, which needs its key.
        return "for which no error row could be written if a text is too long or empty for a folder's name"
    # delta-rs writes -0.05 as 0.-5, after which the table cannot be opened any more.
    decimal = pa.types.is_decimal(kind) and kind.scale
    if decimal or pa.types.is_floating(kind) or pa.types.is_binary(kind) or pa.types.is_list(kind):
        return f"whose type {kind} no partition holds exactly"
    return None


def refuse_differences(
    table: DeltaTable, schema: pa.Schema, partition_by: Sequence[str], way_out: str
) -> None:
    """Raise `InvalidCall` unless the table has the columns of `schema`, and besides them only added ones."""
    there, here = _shape(arrow_schema(table)), _shape(schema)
    added = added_columns(list(there))
    differences = [f"no column {name!r}" for name in here if name not in there]
    differences += [
        f"a column {name!r} that is not wanted" for name in there if name not in here and name not in added
    ]
    differences += [
        f"{name!r} is {there[name]}, not {kind}"
        for name, kind in here.items()
        if there.get(name, kind) != kind
    ]
    differences += [
        f"the added column {field.name!r} is NOT NULL, and new rows have no value for it"
        for field in table.schema().fields
        if field.name in added and not field.nullable
    ]
    partitions = table.metadata().partition_columns
    if partitions != list(partition_by):
        differences.append(f"it is partitioned by {partitions}, not {list(partition_by)}")
    if differences:
        raise InvalidCall(
            f"the table {without_secrets(table.table_uri)!r} exists with another shape: "
            f"{'; '.join(differences)}; {way_out}"
        )


def _shape(schema: pa.Schema) -> dict[str, str]:
    return {f.name: "json" if (f.metadata or {}).get(b"json") else str(f.type) for f in schema}


def with_added(rows: pa.Table, table: DeltaTable) -> pa.Table:
    """`rows` with all columns of the table, NULL in those that they lack.

    Raises `InvalidCall` for a NOT NULL column that was added during a run.
    """
    full = arrow_schema(table)
    for name in (f.name for f in full if not f.nullable and f.name not in rows.column_names):
        raise InvalidCall(
            f"the added column {name!r} of the table {without_secrets(table.table_uri)!r} is NOT NULL, and "
            "new rows have no value for it; drop that, or give another predict_id"
        )
    columns = [rows[f.name] if f.name in rows.column_names else pa.nulls(rows.num_rows, f.type) for f in full]
    return pa.table(columns, schema=full)
