"""chrF of the whole set, as sacrebleu's `corpus_score`: F-score of character n-grams, recall counting `beta`
times as much as precision.

Range 0 to 100, higher is better. Popović 2015, https://aclanthology.org/W15-3049; with `word_order=2` chrF++
(Popović 2017, https://aclanthology.org/W17-4770).
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
    """Options and defaults are sacrebleu's. A list as target is several references; a failed row is an empty
    text.

    Raises `InvalidCall` for an option that sacrebleu does not take, `ImportError` without sacrebleu.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ImportError("chrf needs sacrebleu: pip install 'vllm-tasks[eval]'") from error
    for name, value, least in ("char_order", char_order, 1), ("word_order", word_order, 0), ("beta", beta, 1):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidCall(f"chrf: {name} is a whole number from {least}, not {value!r:.100}")
    chrf = CHRF(char_order, word_order, beta, lowercase, whitespace, eps_smoothing)

    # sacrebleu tells chrF's counts to nobody. These two methods are the seam between its metrics and its own
    # significance tests, so that they stay, and mean the same, for every metric it has.
    def counts(prediction: Any, target: Any) -> list[float]:
        answer = "" if prediction is None else text_of(prediction, "chrf")
        references = [[text] for text in accepted(target, "chrf")]
        (found,) = chrf._extract_corpus_statistics([answer], references)
        return list(found)

    def total(sums: Sequence[float]) -> float:
        return chrf._aggregate_and_compute([[int(x) for x in sums]]).score

    return Sums([counts(p, t) for p, t in zip(predictions, targets, strict=True)], total)


MEASURE = Measure(score, kind="sums", range=(0.0, 100.0))
