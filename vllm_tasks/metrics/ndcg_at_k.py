"""nDCG at k: the sum of gain / log2(place + 1) over the first k of a ranking, divided by that of the best
ranking; the value is the mean over rows.

Range 0 to 1, higher is better. An answer is a ranking, a list of ids from the best to the worst. The target
is a list of relevant ids, each with a gain of 1, or an object from ids to gains (Järvelin and Kekäläinen
2002, https://doi.org/10.1145/582415.582418). An id that a ranking repeats counts at its first place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.rankings import LENGTH, gains_of, ranking_of


def score(prediction: Any, target: Any, *, k: int = LENGTH) -> float:
    """Return the nDCG of one ranking.

    Args:
        prediction: A list of ids, or a text that is JSON. Anything but a list scores 0.
        target: The relevant ids, or an object from ids to their gains.
        k: How many ids of the ranking count.

    Raises:
        InvalidCall: The target names no relevant id, or k is not at least 1.
    """
    gains = gains_of(target, k, "ndcg_at_k")
    found = _dcg(gains.get(name, 0.0) for name in ranking_of(prediction)[:k])
    return found / _dcg(sorted(gains.values(), reverse=True)[:k])


def _dcg(gains: Iterable[float]) -> float:
    return math.fsum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


MEASURE = Measure(score)
