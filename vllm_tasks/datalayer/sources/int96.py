"""Times of Parquet's old type INT96, which Hive, Impala and Spark wrote. It has nanoseconds in years beyond
those of Arrow's nanoseconds; there, as for the popular 9999-12-31, Arrow silently returns another time."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def exact(nanos: pa.RecordBatch, micros: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows read in nanoseconds and in microseconds: each time is taken where it is exact."""
    columns = [_exact(*pair) for pair in zip(nanos.columns, micros.columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=nanos.schema.names)


def _exact(nanos: pa.Array, micros: pa.Array) -> pa.Array:
    if nanos.type == micros.type or not pa.types.is_timestamp(nanos.type):
        return nanos  # times inside lists and structs stay as Arrow reads them
    cut = pc.cast(nanos, micros.type, safe=False).cast(pa.int64())
    away = pc.greater(pc.abs(pc.subtract(cut, micros.cast(pa.int64()))), 1)
    if not pc.any(away).as_py():
        return nanos
    return pa.UnionArray.from_sparse(pc.fill_null(away, False).cast(pa.int8()), [nanos, micros])
