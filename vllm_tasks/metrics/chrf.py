"""chrF of the whole set, as sacrebleu's `corpus_score`: F-score of character n-grams, in which recall counts
`beta` times as much as precision.

Range 0 to 100, higher is better. Popović 2015, https://aclanthology.org/W15-3049; with `word_order=2` it is
chrF++ (Popović 2017, https://aclanthology.org/W17-4770).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure, Sums
from vllm_tasks.metrics.text import accepted, text_of


def score(
    predictions: Sequence[Any],
    targets: Sequence[Any],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Sums:
    """Return the counts of each row, and how chrF follows from their sums.

    The options and their defaults are sacrebleu's.

    Args:
        predictions: The answers in row order; None, for a failed row, counts as an empty text.
        targets: The reference of each row, or a list of references.
        char_order: The length of the longest character n-grams.
        word_order: The length of the longest word n-grams; 0: no words.
        beta: How many times as much as precision recall counts.
        lowercase: Ignore case.
        whitespace: Count white space in character n-grams.
        eps_smoothing: Smooth as chrF++.py, NLTK and Moses do.

    Returns:
        One vector for each row, in their order, and the function from the vectors' sum to chrF.

    Raises:
        InvalidCall: sacrebleu does not take an option, or a target or answer is not a text.
        ImportError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("chrf needs sacrebleu: pip install 'vllm-tasks[eval]'") from error
    for name, value, least in ("char_order", char_order, 1), ("word_order", word_order, 0), ("beta", beta, 1):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidCall(f"chrf: {name} must be an integer of at least {least}, not {value!r:.100}")
    chrf = CHRF(char_order, word_order, beta, lowercase, whitespace, eps_smoothing)

    # sacrebleu has no public method for chrF's counts. Its metrics and its significance tests meet in the two
    # private methods used here, so these keep their meaning for all of its metrics.
    def counts(prediction: Any, target: Any) -> list[float]:
        answer = "" if prediction is None else text_of(prediction, "chrf")
        references = [[text] for text in accepted(target, "chrf")]
        (found,) = chrf._extract_corpus_statistics([answer], references)
        return list(found)

    def total(sums: Sequence[float]) -> float:
        return chrf._aggregate_and_compute([[int(x) for x in sums]]).score

    return Sums([counts(p, t) for p, t in zip(predictions, targets, strict=True)], total)


MEASURE = Measure(score, kind="sums", range=(0.0, 100.0))
