"""The rows of the reference sets: one JSONL file each, written by the programs in `reference_sets/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

ReferenceName = Literal["arithmetic", "classification", "extraction", "retrieval"]


def rows_of(name: ReferenceName) -> list[dict[str, Any]]:
    """Return the rows of a reference set.

    Args:
        name: The name of the set.

    Returns:
        240 rows with `id`, `topic`, `level` (1 to 3, from easy to hard), an input and a known answer.
    """
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
