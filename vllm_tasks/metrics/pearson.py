"""Pearson's correlation of answers and targets, which are numbers: their covariance, divided by the product
of their standard deviations.

Range -1 to 1, higher is better. It measures whether scores grow with the targets along a line; `spearman`
asks for their order alone. Failed rows and answers that are no number are left out. Without a spread in both
it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_tasks.metrics.measure import Measure, Sums
from vllm_tasks.metrics.numbers import UNDEFINED, pairs_of


def score(predictions: Sequence[Any], targets: Sequence[Any]) -> Sums:
    """Return the sums of each row, and the function from their sums to the correlation.

    Args:
        predictions: Numbers, or texts that are one; None for a failed row.
        targets: The right numbers.

    Raises:
        InvalidCall: A target is not a number.
    """
    pairs = pairs_of(predictions, targets, "pearson")
    # A shift changes no correlation, and keeps the sums of squares small: large ones would lose digits.
    shift = np.nanmean(pairs, axis=0) if np.isfinite(pairs).any() else np.zeros(2)
    x, y = (pairs - shift).T
    rows = np.nan_to_num(np.stack([np.ones(len(x)) * np.isfinite(x), x, y, x * x, y * y, x * y], axis=1))
    return Sums(rows.tolist(), _correlation)


def _correlation(sums: Sequence[float]) -> float:
    n, x, y, xx, yy, xy = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else math.nan


MEASURE = Measure(score, kind="sums", range=(-1.0, 1.0), miss=None, undefined=UNDEFINED)
