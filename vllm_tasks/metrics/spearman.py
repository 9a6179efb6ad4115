"""Spearman's correlation of answers and targets, which are numbers: Pearson's correlation of their ranks.

Range -1 to 1, higher is better. Equal numbers have the mean of their ranks (Spearman 1904). Failed rows and
answers that are not numbers are left out. Two runs cannot be compared row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.numbers import UNDEFINED, is_number, pairs_of


def score(predictions: Sequence[Any], targets: Sequence[Any]) -> float:
    """Return the correlation of a set; nan without a spread in both.

    Args:
        predictions: Numbers, or texts that are one; None for a failed row.
        targets: The right numbers.

    Raises:
        InvalidCall: A target is not a number.
    """
    pairs = pairs_of(predictions, targets, "spearman")
    x, y = map(_ranks, pairs[np.isfinite(pairs[:, 0])].T)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the rank of each value, the mean of their ranks for equal ones."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: npt.NDArray[np.float64] = np.cumsum(counts, dtype=np.float64)
    return (last - (counts - 1) / 2)[places]


MEASURE = Measure(score, kind="set", range=(-1.0, 1.0), miss=None, undefined=UNDEFINED, takes=is_number)
