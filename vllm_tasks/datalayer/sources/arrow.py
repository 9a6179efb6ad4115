"""Parts of a source that comes as batches of Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from vllm_tasks.datalayer.sources import PART_BYTES, Part, Unreadable, Values
from vllm_tasks.datalayer.sources.keys import cast_keys, known
from vllm_tasks.datalayer.values import python


def part_of(
    batch: pa.RecordBatch | pa.Table,
    key: pa.Schema,
    columns: Sequence[str],
    unreadable: Unreadable,
    where: str,
) -> Part:
    """The rows of `batch`, which has the columns of `key` and `columns`; those without a key go to
    `unreadable`, as of the place `where`."""
    if not key.names:
        return Part(pa.table({}), lambda rows: values_of(batch, columns, rows), rows=batch.num_rows)
    keys, wrong = cast_keys(pa.table({name: batch[name] for name in key.names}), key)
    kept = known(keys)
    if len(kept) < keys.num_rows:
        tell(keys, wrong, kept, unreadable, where)
        kept_rows = pa.array(kept)
        batch, keys = batch.take(kept_rows), keys.take(kept_rows)
    return Part(keys, lambda rows: values_of(batch, columns, rows))


def tell(
    keys: pa.Table, wrong: dict[int, str], kept: Iterable[int], unreadable: Unreadable, where: str
) -> None:
    """Count the rows that are not `kept`."""
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
    """How many rows of `batch` have about `most` bytes, at least one."""
    return max(1, int(most * batch.num_rows // max(1, batch.nbytes)))
