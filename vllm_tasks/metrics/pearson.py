"""Pearson's correlation of answers and targets, which are numbers: their covariance, divided by the product
of their standard deviations.

Range -1 to 1, higher is better. It measures whether scores grow with the targets along a line; `spearman`
asks for their order alone. Failed rows and answers that are not numbers are left out. Without a spread in
both it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_tasks.metrics.measure import Measure, Sums
from vllm_tasks.metrics.numbers import UNDEFINED, is_number, pairs_of

NO_SPREAD = 1e-12
"""A spread of this fraction of the squares is what rounding leaves of equal numbers."""


def score(predictions: Sequence[Any], targets: Sequence[Any]) -> Sums:
    """Return the sums of each row, and the function from their sums to the correlation.

    Args:
        predictions: Numbers, or texts that are one; None for a failed row.
        targets: The right numbers.

    Raises:
        InvalidCall: A target is not a number.
    """
    pairs = pairs_of(predictions, targets, "pearson")
    known = np.isfinite(pairs[:, 0])
    rows = np.zeros((len(pairs), 6))
    if known.any():
        # Neither a shift nor a scale changes a correlation. Halves have finite differences, and numbers from
        # -1 to 1 finite squares that lose no digits; equal numbers become 0, since they are the median.
        halves = pairs[known] / 2
        moved = halves - np.median(halves, axis=0)
        largest = np.abs(moved).max(axis=0)
        x, y = (moved / np.where(largest > 0, largest, 1.0)).T
        rows[known] = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)
    return Sums(rows.tolist(), _correlation)


def _correlation(sums: Sequence[float]) -> float:
    n, x, y, xx, yy, xy = sums
    spreads = [n * xx - x * x, n * yy - y * y]
    if any(one <= NO_SPREAD * n * squares for one, squares in zip(spreads, (xx, yy), strict=True)):
        return math.nan
    return min(max((n * xy - x * y) / math.prod(map(math.sqrt, spreads)), -1.0), 1.0)


MEASURE = Measure(score, kind="sums", range=(-1.0, 1.0), miss=None, undefined=UNDEFINED, takes=is_number)
