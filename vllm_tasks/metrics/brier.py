"""Brier score: half of the sum over classes of (p - y)^2, where y is 1 for the target's class, else 0; the
value is the mean over rows.

From 0 to 1, lower is better. For two classes it is (p - y)^2 of one of them. Brier 1950,
https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2, halved, as scikit-learn's
`brier_score_loss(scale_by_half=True)`. A target that is none of the model's classes has the probability 0.
It needs answers with probabilities. Failed rows are left out.
"""

from __future__ import annotations

import math

from vllm_tasks.metrics.classes import probabilities_of, target_class
from vllm_tasks.metrics.measure import Answer, Measure


def score(answer: Answer) -> float:
    """Return the Brier score of a row.

    Raises:
        InvalidCall: The answer has no probabilities, or the target is a list.
    """
    probabilities = probabilities_of(answer.prediction, "brier")
    wanted = target_class(answer.target, None, "brier").casefold()
    squares = [p**2 for name, p in probabilities.items() if name != wanted]
    return (math.fsum(squares) + (1 - probabilities.get(wanted, 0.0)) ** 2) / 2


MEASURE = Measure(score, kind="answer", asks="probabilities", higher_is_better=False, miss=None)
