"""Partitions of outputs in a lake: the columns and values that folder names hold exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn

FOLDER_BYTES = 255
"""Limit of a folder's name on file systems; applied on object stores too, so that a lake can be moved."""
LOST = "~"
"""delta-rs 1.6 writes ~ unchanged into a folder's name but as %7E into the log, and then misses the file."""
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
"""The name of NULL's folder; next to rows with NULL, delta-rs writes a text of this name as NULL."""
OTHER_COLUMN = "partition by another column"
INEXACT_OUTPUTS = {"float": "numbers with a point", "bytes": "bytes", "vector": "vectors"}
"""A float of 1e300 would have a name of 301 digits, and equal floats (0.0, -0.0) two names. delta-rs writes
bytes as text with escapes, and reads the escapes as the bytes."""


def named(partition_by: Any) -> tuple[str, ...]:
    """`partition_by` as columns; raises ValueError unless it is a list of different names."""
    columns = (partition_by,) if isinstance(partition_by, str) else partition_by
    if not isinstance(columns, list | tuple) or not all(isinstance(c, str) and c for c in columns):
        raise ValueError(
            f"partition_by={partition_by!r:.200} is neither the name of a column nor a list of them"
        )
    if len(set(columns)) < len(columns):
        raise ValueError(f"partition_by={list(columns)!r:.200} names a column twice")
    return tuple(columns)


def refuse_inexact(partition_by: Sequence[str], columns: Sequence[OutputColumn]) -> None:
    """Raise ValueError if partitions by an output or by one of our columns would not be exact.

    The key's columns are not known before a call; `delta_shape.refuse_partitions` checks them.
    """
    kinds: dict[str, str] = {**OWN_COLUMNS, **{column.name: column.kind for column in columns}}
    for name in partition_by:
        if name == "_error":
            raise ValueError(
                f"partition_by names '_error', whose texts are too long for names of folders; {OTHER_COLUMN}"
            )
        if what := INEXACT_OUTPUTS.get(kinds.get(name, "")):
            raise ValueError(
                f"partition_by names {name!r}: names of folders do not hold {what} exactly; {OTHER_COLUMN}"
            )
        if LOST in name:
            raise ValueError(
                f"partition_by names {name!r}: delta-rs loses files of a partition with a ~; {OTHER_COLUMN}"
            )


def problem_of_partition(name: str, text: str) -> str | None:
    """Why the column `name` cannot have a partition for `text`, None if it can."""
    if text == "":
        return "an empty text, which as the name of a partition would be NULL"
    if text == NULL_FOLDER:
        return f"the text {NULL_FOLDER}, which is the name of NULL's partition"
    if LOST in text:
        return "a text with a ~, whose partition delta-rs loses"
    # The size of Delta's folder name, column=value.
    size = len(quote(name, safe="")) + 1 + len(quote(text, safe=""))
    if size > FOLDER_BYTES:
        return f"a text that takes {size:,} bytes in a partition's name, which may have {FOLDER_BYTES}"
    return None
