"""Perplexity of the targets after their prompts: exp(-sum of log probabilities / number of tokens), over all
tokens of the set.

From 1, lower is better (Jelinek et al. 1977). It is per token of the model's own tokenizer: models with
different ones cannot be compared by it. Failed rows are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.measure import Likelihood, Measure, Sums


def score(predictions: Sequence[Sequence[Likelihood] | None], targets: Sequence[Any]) -> Sums:
    """Of rows with the likelihood of one text each; a text without tokens adds nothing. The perplexity of no
    tokens is nan."""
    return Sums([_sums(prediction) for prediction in predictions], _total)


def _sums(prediction: Sequence[Likelihood] | None) -> tuple[float, float]:
    if prediction is None:
        return 0.0, 0.0
    (text,) = prediction
    return (-text.logprob, float(text.tokens)) if text.tokens else (0.0, 0.0)


def _total(sums: Sequence[float]) -> float:
    surprise, tokens = sums
    if not tokens:
        return math.nan
    try:
        return math.exp(surprise / tokens)
    except OverflowError:
        return math.inf


MEASURE = Measure(
    score, kind="sums", asks="likelihood", range=(1.0, math.inf), higher_is_better=False, miss=None
)
