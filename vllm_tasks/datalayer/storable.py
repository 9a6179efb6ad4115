"""Values that every outputs table can hold, and the choice between two outputs of one key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_tasks.datalayer.selection import POSITION, Key, Row

INT64 = range(-(2**63), 2**63)
HALF_A_CHARACTER = "half a character (a lone surrogate) cannot be stored"


def to_json(value: Any) -> str:
    """JSON text; raises TypeError, ValueError or RecursionError for values without JSON, such as NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def is_text(value: str) -> bool:
    """Whether a text can be UTF-8: it has no lone surrogate, of its own or in place of a wrong byte."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def last_outputs(rows: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """The last output of each key: a repeated position starts a new output."""
    found: dict[Key, dict[int, Row]] = {}
    for row in rows:
        output = found.setdefault(tuple(row[name] for name in key), {})
        position = row.get(POSITION) or 0
        if position in output:
            output.clear()
        output[position] = row
    return [row for output in found.values() for row in output.values()]
