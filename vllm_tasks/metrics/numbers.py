"""Reads numbers from answers and targets, for metrics that correlate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tasks.errors import InvalidCall

UNDEFINED = (
    "it needs two rows or more whose answers are numbers, and neither these nor their targets all equal"
)
"""What a correlation is not defined without."""


def pairs_of(predictions: Sequence[Any], targets: Sequence[Any], metric: str) -> npt.NDArray[np.float64]:
    """Return a row (answer, target) for each row; both are nan where the answer is not a number.

    Raises `InvalidCall` for a target that is not a number.
    """
    wanted = [_number(target) for target in targets]
    for target, number in zip(targets, wanted, strict=True):
        if math.isnan(number):
            raise InvalidCall(f"{metric} takes numbers as targets, not {target!r:.100}")
    pairs = np.array([[_number(p) for p in predictions], wanted], dtype=np.float64).T
    pairs[np.isnan(pairs[:, 0])] = math.nan
    return pairs


def is_number(value: Any) -> bool:
    """Return whether an answer is a finite number, or a text that is one."""
    return not math.isnan(_number(value))


def _number(value: Any) -> float:
    """Return a finite number, or nan."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan
