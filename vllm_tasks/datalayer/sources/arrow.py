"""Parts of a source that is read as Arrow batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa

from vllm_tasks.datalayer.sources import PART_BYTES, Part, Unreadable, Values
from vllm_tasks.datalayer.sources.keys import cast_keys, fitting, key_type, known
from vllm_tasks.datalayer.storage_errors import storage_errors
from vllm_tasks.datalayer.values import python

KEYS_AT_ONCE, ROWS_AT_ONCE = 1 << 17, 1 << 16
"""Rows that are joined with the outputs together: if only keys are read, and if values are read, too."""


def part_of(
    batch: pa.RecordBatch | pa.Table,
    key: pa.Schema,
    columns: Sequence[str],
    unreadable: Unreadable,
    where: str,
) -> Part:
    """The rows of `batch`, which has the columns of `key` and `columns`; rows without a key go to
    `unreadable`, with the place `where`."""
    if not key.names:
        return Part(pa.table({}), lambda rows: values_of(batch, columns, rows), rows=batch.num_rows)
    keys, wrong = cast_keys(pa.table({name: batch[name] for name in key.names}), key)
    kept = known(keys)
    if len(kept) < keys.num_rows:
        count_unreadable(keys, wrong, kept, unreadable, where)
        kept_rows = pa.array(kept)
        batch, keys = batch.take(kept_rows), keys.take(kept_rows)
    return Part(keys, lambda rows: values_of(batch, columns, rows))


def count_unreadable(
    keys: pa.Table, wrong: dict[int, str], kept: Iterable[int], unreadable: Unreadable, where: str
) -> None:
    """Add the rows that are not `kept` to `unreadable`."""
    for i in sorted(set(range(keys.num_rows)) - set(kept)):
        unreadable.add(where, wrong.get(i, f"a row has NULL for the key {', '.join(keys.column_names)}"))


def values_of(
    batch: pa.RecordBatch | pa.Table, columns: Sequence[str], rows: Sequence[int]
) -> Iterator[list[Values]]:
    """See `Part.values`."""
    wanted = pa.array(rows, pa.int64())
    step = rows_within(PART_BYTES, batch)
    for start in range(0, len(wanted), step):
        some = batch.take(wanted.slice(start, step))
        found = [python(some[name]) for name in columns]
        yield list(zip(*found, strict=True)) if found else [()] * some.num_rows


def rows_within(most: int, batch: pa.RecordBatch | pa.Table) -> int:
    """The number of rows of `batch` in about `most` bytes, at least one."""
    return max(1, int(most * batch.num_rows // max(1, batch.nbytes)))


class ArrowSource:
    """`Source` of anything that can be read repeatedly as an Arrow stream; `read(columns)` starts one."""

    def __init__(
        self, schema: pa.Schema, read: Callable[[Sequence[str]], pa.RecordBatchReader], display: str
    ) -> None:
        self._schema = schema
        self._read = read
        self._display = display

    def columns(self) -> Sequence[str]:
        return list(self._schema.names)

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        return [key_type(name, self._schema.field(name).type) for name in key]

    def identified_by(self, key: Sequence[str]) -> bool:
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for found in self._tables(key.names, KEYS_AT_ONCE):
            yield fitting(found, key)

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        for found in self._tables(list(dict.fromkeys((*key.names, *columns))), ROWS_AT_ONCE):
            yield part_of(found, key, columns, unreadable, self._display)

    def close(self) -> None:
        pass

    def _tables(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        with storage_errors(f"cannot read {self._display!r}"), self._read(columns) as reader:
            yield from gathered(reader, rows)


def gathered(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The batches, combined to tables of about `rows` rows or `PART_BYTES`."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(b.num_rows for b in held) >= rows or sum(b.nbytes for b in held) >= PART_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)
