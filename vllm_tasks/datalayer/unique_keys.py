"""Checks that a key identifies the rows of a source: no NULL, no key twice, no date that Python lacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.errors import InvalidCall
from vllm_tasks.printable import one_line

logger = logging.getLogger(__name__)

KEYS = "_vllm_tasks_keys"
STRANGE = "{0} < '0001-01-01' OR {0} >= '10000-01-01'"
"""Condition on a date that Python lacks: it has the years 1 to 9999, and no infinity."""


def ascending(tables: Iterator[pa.Table], key: pa.Schema) -> bool:
    """Whether each key is larger than the one before, so that none occurs twice; stops at once if not."""
    if len(key) != 1 or pa.types.is_temporal(key[0].type):
        return False
    last = None
    for table in tables:
        column = pa.concat_arrays(table[0].chunks) if table[0].num_chunks else pa.array([], key[0].type)
        if not len(column):
            continue
        begins = last is None or pc.less(last, column[0]).as_py()
        if not begins or not pc.all(pc.less(column[:-1], column[1:]), skip_nulls=False).as_py():
            return False
        last = column[-1]
    return last is None or last.is_valid


def refuse_bad_keys(
    cursor: duckdb.DuckDBPyConnection, tables: Iterator[pa.Table], key: pa.Schema, display: str
) -> None:
    """Raise `InvalidCall` for keys that are NULL, not unique, or have dates that Python lacks.

    `tables` has the keys of the source that people know as `display`.
    """
    named = ", ".join(key.names)
    logger.info("checking in one pass that %s is unique in %s", named, one_line(display, 80))
    cursor.register(KEYS, pa.RecordBatchReader.from_batches(_numbered(key), _renamed(tables, key)))
    nulls, strange, doubled, rows, *examples = cursor.execute(_faults(key)).fetchall()[0]
    width = len(key.names)

    def example(values: Sequence[Any]) -> str:
        return ", ".join(f"{n}={v!r:.100}" for n, v in zip(key.names, values, strict=True))

    if nulls:
        raise InvalidCall(
            f"{nulls} rows of {display!r} have NULL for {named}; exclude them with "
            "SELECT ... WHERE ... IS NOT NULL, or give another primary_id"
        )
    if strange:
        raise InvalidCall(
            f"{strange} rows of {display!r} have a key with a date that Python lacks, for example "
            f"{example(examples[width:])}; CAST it to VARCHAR in a SELECT, exclude them with "
            "SELECT ... WHERE, or give another primary_id"
        )
    if doubled:
        raise InvalidCall(
            f"{named} does not identify the rows of {display!r}: {doubled} keys have {rows} rows, "
            f"for example {example(examples[:width])}; give another primary_id, or several columns"
        )


def _faults(key: pa.Schema) -> str:
    """A query that counts rows whose key is NULL, has a date that Python lacks, or is repeated.

    Its columns: the rows with NULL; those with such a date; the repeated keys; their rows; the first such key
    in order; the first key with such a date, as text.
    """
    keys = [f"k{i}" for i in range(len(key.names))]
    order = ", ".join(keys)
    null = f"({' OR '.join(f'{k} IS NULL' for k in keys)})"
    dates = [k for k, field in zip(keys, key, strict=True) if pa.types.is_temporal(field.type)]
    strange = f"({' OR '.join(STRANGE.format(k) for k in dates) or 'false'})"
    return f"""
        SELECT coalesce(sum(n) FILTER ({null}), 0)::BIGINT,
            coalesce(sum(n) FILTER ({strange}), 0)::BIGINT,
            count(*) FILTER (NOT {null}), coalesce(sum(n) FILTER (NOT {null}), 0)::BIGINT,
            {", ".join(f"first({k} ORDER BY {order}) FILTER (NOT {null})" for k in keys)},
            {", ".join(f"first({k}::VARCHAR ORDER BY {order}) FILTER ({strange})" for k in keys)}
        FROM (
            SELECT {order}, count(*) AS n FROM {KEYS}
            GROUP BY ALL HAVING count(*) > 1 OR {null} OR {strange}
        )
        """  # noqa: S608 - names of our own


def _numbered(key: pa.Schema) -> pa.Schema:
    return pa.schema([(f"k{i}", field.type) for i, field in enumerate(key)])


def _renamed(tables: Iterator[pa.Table], key: pa.Schema) -> Iterator[pa.RecordBatch]:
    for table in tables:
        yield from table.rename_columns(_numbered(key).names).cast(_numbered(key)).to_batches()
