"""Folders named `year=2024` as columns of the files in them, as in DuckDB, Spark and pandas.

Values are text, like the cells of a CSV: a name does not say whether 007 is a number. A column of that name
in the files themselves is not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from vllm_tasks.datalayer.lake.partitions import NULL_FOLDER
from vllm_tasks.errors import InvalidCall

FOLDER = re.compile(r"([^=/]+)=([^=/]*)")

Partition = dict[str, str | None]
"""Values that are the same in all rows of a file, by column."""


def partitions(folders: Sequence[str]) -> list[Partition]:
    """The partition of each path; empty unless all paths name the same columns."""
    found = [_partition(folder) for folder in folders]
    return found if len({frozenset(each) for each in found}) == 1 else [{} for _ in found]


def _partition(folder: str) -> Partition:
    found: Partition = {}
    for name, value in (match.groups() for part in folder.split("/") if (match := FOLDER.fullmatch(part))):
        if name.casefold() in map(str.casefold, found):
            raise InvalidCall(f"the folder {folder!r:.300} names {name!r:.100} twice; rename one of them")
        try:
            found[name] = None if value == NULL_FOLDER else unquote(value, errors="strict")
        except UnicodeDecodeError as e:
            raise InvalidCall(f"the folder {folder!r:.300} is not text after decoding: {e}; rename it") from e
    return found
