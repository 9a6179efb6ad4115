"""Writes the rows of all reference sets: `python -m reference_sets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reference_sets import arithmetic, classification, extraction, retrieval

FOLDER = Path(__file__).parent.parent / "vllm_tasks" / "validation" / "sets"
SETS = {
    "arithmetic": arithmetic.rows,
    "classification": classification.rows,
    "extraction": extraction.rows,
    "retrieval": retrieval.rows,
}


def content_of(rows: list[dict[str, Any]]) -> str:
    """Return the text of a set's file: JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, rows in SETS.items():
        (FOLDER / f"{name}.jsonl").write_text(content_of(rows()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
