"""Token F1: 2 P R / (P + R) of the words that answer and target have in common; the value is the mean over
rows.

P is their fraction of the answer's words and R of the target's; a word counts as often as both have it. Range
0 to 1, higher is better. As in SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250), texts are
lowercased, punctuation and the articles a, an, the are removed, and white space separates the words. If a
text has no words, the score is 1 if neither has any, else 0 (SQuAD 2.0: Rajpurkar et al. 2018,
https://arxiv.org/abs/1806.03822).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import SQUAD, accepted, check_steps, normalized, text_of


def score(prediction: Any, target: Any) -> float:
    """Return the F1 of an answer.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which the one with the largest F1 counts.

    Raises:
        InvalidCall: The target or the answer is not a text.
    """
    answer = _words(text_of(prediction, "token_f1"))
    return max(_f1(answer, _words(text)) for text in accepted(target, "token_f1"))


def _words(text: str) -> Counter[str]:
    return Counter(normalized(text, check_steps(SQUAD)).split())


def _f1(answer: Counter[str], target: Counter[str]) -> float:
    if not answer or not target:
        return float(answer == target)
    return 2 * (answer & target).total() / (answer.total() + target.total())


MEASURE = Measure(score)
