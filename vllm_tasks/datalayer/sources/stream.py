"""Text files as a stream of Arrow, for SQL: as often as it is asked for, a fresh pass each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from vllm_tasks.datalayer.sources import Unreadable


class Streamed(Protocol):
    """A source that has batches of typed columns."""

    left_out: Unreadable
    """What the last pass left out."""

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """The types in which all values of these columns are exact; raises `InvalidCall` for one that is not
        there."""

    def batches(self, schema: pa.Schema, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        """All rows that can be read, in these types."""


class Stream:
    """What DuckDB registers: these columns of `source`, as often as it asks for them.

    Rows that cannot be read are left out and counted in `source.left_out`, anew for each pass.
    """

    def __init__(self, source: Streamed, columns: Sequence[str]) -> None:
        self.source = source
        self.schema = source.schema(columns)
        self.error: Exception | None = None
        """Why the last pass ended early; DuckDB shows no more than its text."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        self.source.left_out = Unreadable()
        self.error = None
        reader = pa.RecordBatchReader.from_batches(self.schema, self._batches(self.source.left_out))
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        try:
            yield from self.source.batches(self.schema, unreadable)
        except Exception as e:
            self.error = e
            raise
