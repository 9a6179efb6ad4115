"""Vectors in tables: lists of numbers of 32 bits, in a database without arrays little-endian bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer.values import python

VECTOR = pa.list_(pa.field("element", pa.float32()))
"""The type in Arrow. Delta has no lists of fixed length, and names their items `element`."""
BLOB = "F32_BLOB"
"""The declared type in SQLite, where it has the affinity BLOB: libSQL's name for these bytes, which
sqlite-vec reads too."""


def to_bytes(vector: Sequence[float]) -> bytes:
    """Return the bytes of a vector."""
    return np.asarray(vector, "<f4").tobytes()


def of_bytes(raw: bytes) -> list[float]:
    """Return the vector of these bytes, with the numbers that other tables give; see `values`."""
    return python(pa.array(np.frombuffer(raw, "<f4").astype("=f4")))
