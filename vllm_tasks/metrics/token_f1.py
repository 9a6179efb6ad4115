"""Token F1: 2 P R / (P + R) of the words that answer and target have in common; the value is the mean of
rows.

P is their share of the answer's words and R of the target's, each word as often as it occurs in both. Range 0
to 1, higher is better. From SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250): words are what
white space separates after lowering case and taking out punctuation and the articles a, an, the. Where one
side has no words, it is 1 if neither has, else 0 (SQuAD 2.0: Rajpurkar et al. 2018,
https://arxiv.org/abs/1806.03822).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import SQUAD, accepted, normalized, text_of


def score(prediction: Any, target: Any) -> float:
    """Of one answer; of a list as target the largest over its texts."""
    answer = _words(text_of(prediction, "token_f1"))
    return max(_f1(answer, _words(text)) for text in accepted(target, "token_f1"))


def _words(text: str) -> Counter[str]:
    return Counter(normalized(text, SQUAD).split())


def _f1(answer: Counter[str], target: Counter[str]) -> float:
    if not answer or not target:
        return float(answer == target)
    return 2 * (answer & target).total() / (answer.total() + target.total())


MEASURE = Measure(score)
