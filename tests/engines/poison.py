"""1,000 rows with 10 poisoned ones, and the expected result for any model."""

from __future__ import annotations

from typing import Any

from vllm_tasks import RowError

POISON = ["word " * 2000, None, object(), "half a \ud83d face", "x" * 10_000_000]
PLACES = {50 + 90 * i: POISON[i % 5] for i in range(10)}
ROWS = [PLACES.get(i, f"row {i}") for i in range(1000)]


def check_poisoned(results: list[Any]) -> None:
    """Check 990 answers in order, and 10 errors that name their row and reason."""
    errors = [r for r in results if isinstance(r, RowError)]
    assert [e.index for e in errors] == sorted(PLACES)
    assert [e.kind for e in errors] == ["too_long", "prompt", "prompt", "prompt", "too_long"] * 2
    reasons = ["context length", "None", "a object", "Unicode", "context length"] * 2
    assert all(reason in e.message for e, reason in zip(errors, reasons, strict=True))
    assert all(isinstance(r, str) for i, r in enumerate(results) if i not in PLACES)
