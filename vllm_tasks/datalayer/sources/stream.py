"""Text files as an Arrow stream for SQL, which may be opened repeatedly; each time the files are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from vllm_tasks.datalayer.sources import Unreadable


class Streamed(Protocol):
    """A source with batches of typed columns."""

    left_out: Unreadable
    """The rows that the last pass skipped."""

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """The types that hold all values of these columns exactly; raises `InvalidCall` for a missing
        column."""

    def batches(self, schema: pa.Schema, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        """All readable rows, in these types."""


class Stream:
    """The object that DuckDB registers: these columns of `source`, which it may read repeatedly.

    Unreadable rows are skipped and counted in `source.left_out`, which each pass resets.
    """

    def __init__(self, source: Streamed, columns: Sequence[str]) -> None:
        self.source = source
        self.schema = source.schema(columns)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        self.source.left_out = Unreadable()
        batches = self.source.batches(self.schema, self.source.left_out)
        reader = pa.RecordBatchReader.from_batches(self.schema, batches)
        return reader.__arrow_c_stream__(requested_schema)
