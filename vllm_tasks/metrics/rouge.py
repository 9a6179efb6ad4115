"""ROUGE: F-measure of the n-grams (`rouge1`, `rouge2`) or of the longest subsequence of words (`rougeL`;
`rougeLsum` line by line) that answer and target have in common; the value is the mean over rows.

Range 0 to 1, higher is better. Lin 2004, https://aclanthology.org/W04-1013; computed by rouge-score, which
reads the letters a to z and digits, and no other script. Time and memory of the longest common subsequence
grow with the product of both lengths: it takes a second for some million pairs of words.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of

Kind = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


def score(prediction: Any, target: Any, *, kind: Kind = "rougeL", use_stemmer: bool = False) -> float:
    """Return the F-measure of an answer.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which the one with the largest value counts.
        kind: The variant of ROUGE.
        use_stemmer: Compare the stems of English words (Porter's stemmer).

    Raises:
        InvalidCall: The kind is unknown, or the target or the answer is not a text.
        ImportError: rouge-score is not installed.
    """
    if kind not in get_args(Kind):
        raise InvalidCall(
            f"rouge: kind is {kind!r:.100}{near(str(kind), get_args(Kind))}; "
            f"known are {', '.join(get_args(Kind))}"
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
