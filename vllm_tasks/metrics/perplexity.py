"""Perplexity of the targets after their prompts: exp(-sum of log probabilities / number of tokens), over all
tokens of the set.

From 1, lower is better (Jelinek et al. 1977). It is per token of the model's own tokenizer, so it cannot
compare models with different tokenizers. Failed rows are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.measure import Likelihood, Measure, Sums


def score(predictions: Sequence[Sequence[Likelihood] | None], targets: Sequence[Any]) -> Sums:
    """Return the sums of each row, and the function from their total to perplexity (nan without tokens).

    Args:
        predictions: Per row a list with the likelihood of one text, or None for a failed row. A text without
            tokens adds nothing.
        targets: Ignored.
    """
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
