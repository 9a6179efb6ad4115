"""ROUGE: F-measure of what answer and target have in common, of n-grams (`rouge1`, `rouge2`) or of the
longest common subsequence of words (`rougeL`; `rougeLsum` line by line); the value is the mean of rows.

Range 0 to 1, higher is better. Lin 2004, https://aclanthology.org/W04-1013; computed by rouge-score, which
knows the letters a to z and digits, and nothing of other scripts. The longest common subsequence takes time
and memory of the product of both lengths: a second for some million pairs of words.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of

Kind = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


def score(prediction: Any, target: Any, *, kind: Kind = "rougeL", use_stemmer: bool = False) -> float:
    """Of one answer; of a list as target the largest over its texts.

    use_stemmer: compare the stems of words (Porter's, for English).

    Raises `InvalidCall` for another kind, `ImportError` without rouge-score.
    """
    if kind not in get_args(Kind):
        raise InvalidCall(
            f"rouge: kind is {kind!r:.100}{near(str(kind), get_args(Kind))}; "
            f"there are {', '.join(get_args(Kind))}"
        )
    answer, texts = text_of(prediction, "rouge"), accepted(target, "rouge")
    return float(_scorer(kind, use_stemmer).score_multi(texts, answer)[kind].fmeasure)


@cache
def _scorer(kind: Kind, use_stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("rouge needs rouge-score: pip install 'vllm-tasks[eval]'") from error
    return RougeScorer([kind], use_stemmer=use_stemmer)


MEASURE = Measure(score)
