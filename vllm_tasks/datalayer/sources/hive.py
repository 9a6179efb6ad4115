"""Folders named `year=2024`: a column of the files in them, as DuckDB, Spark and pandas have it.

Its values are texts, as the cells of a CSV are: no name says whether 007 is a number. What the files have
under that name themselves is not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from vllm_tasks.errors import InvalidCall

FOLDER = re.compile(r"([^=/]+)=([^=/]*)")
NULL = "__HIVE_DEFAULT_PARTITION__"

Partition = dict[str, str | None]
"""Columns that are the same in all rows of a file, by name."""


def partitions(folders: Sequence[str]) -> list[Partition]:
    """What each of these paths says; nothing where they do not all name the same columns."""
    found = [_partition(folder) for folder in folders]
    return found if len({frozenset(each) for each in found}) == 1 else [{} for _ in found]


def _partition(folder: str) -> Partition:
    found: Partition = {}
    for name, value in (match.groups() for part in folder.split("/") if (match := FOLDER.fullmatch(part))):
        if name.casefold() in map(str.casefold, found):
            raise InvalidCall(f"the folder {folder!r:.300} names {name!r:.100} twice; rename one of them")
        try:
            found[name] = None if value == NULL else unquote(value, errors="strict")
        except UnicodeDecodeError as e:
            raise InvalidCall(f"the folder {folder!r:.300} is no text where it is decoded: {e}") from e
    return found
