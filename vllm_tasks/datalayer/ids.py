"""The `ids` of a call as a table of keys, in the types in which the outputs keep them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer.lake.columns import arrow_column
from vllm_tasks.datalayer.selection import Key
from vllm_tasks.errors import InvalidCall


def key_table(ids: Iterable[Key], key: pa.Schema) -> pa.Table:
    """`ids` as the columns k0, k1, ...

    Raises `InvalidCall` for an id that is not a key of the columns `key`.
    """
    plain = [_plain_key(i, key) for i in ids]
    columns = []
    for i, field in enumerate(key):
        try:
            columns.append(arrow_column(field.name, field.type, [row[i] for row in plain]))
        except ValueError as e:
            raise InvalidCall(f"ids: {e}") from e
    return pa.table(columns, names=[f"k{i}" for i in range(len(key))])


def _plain_key(key: Key, wanted: pa.Schema) -> Key:
    if len(key) != len(wanted) or any(value is None for value in key):
        raise InvalidCall(f"ids: {key!r:.200} must be a key of {len(wanted)} values, none of them None")
    return tuple(_as_kept(value, field.type) for value, field in zip(key, wanted, strict=True))


def _as_kept(value: Any, kind: pa.DataType) -> Any:
    """A value of `ids` as the outputs keep it: a UUID, or a number where keys are text, becomes text."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and pa.types.is_string(kind)
    return str(value) if whole or isinstance(value, UUID) else value
