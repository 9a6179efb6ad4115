"""BLEU of the whole set, as sacrebleu's `corpus_score`: brevity penalty times the geometric mean of n-gram
precisions.

Range 0 to 100, higher is better. Papineni et al. 2002, https://aclanthology.org/P02-1040; sacrebleu: Post
2018, https://aclanthology.org/W18-6319. A row's own score is of that row alone, and says little of a short
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.measure import Measure, Sums
from vllm_tasks.metrics.text import accepted, text_of

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU


def score(
    predictions: Sequence[Any],
    targets: Sequence[Any],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
    smooth_method: Literal["none", "floor", "add-k", "exp"] = "exp",
    smooth_value: float | None = None,
    max_ngram_order: int = 4,
    effective_order: bool = False,
) -> Sums:
    """Options and defaults are sacrebleu's. A list as target is several references; a failed row is an empty
    text.

    Raises `InvalidCall` for an option that sacrebleu does not take, `ImportError` without sacrebleu.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("bleu needs sacrebleu: pip install 'vllm-tasks[eval]'") from error
    _check(tokenize, smooth_method, smooth_value, max_ngram_order)
    try:
        # Counts are taken unsmoothed, since "add-k" adds to them; the sums are smoothed.
        counting = BLEU(
            lowercase=lowercase,
            tokenize=tokenize,
            smooth_method="none",
            max_ngram_order=max_ngram_order,
            effective_order=True,
        )
    except (ImportError, RuntimeError) as error:  # of "ja-mecab", "ko-mecab" and "spm"
        raise InvalidCall(f"bleu: sacrebleu's tokenizer {tokenize!r} needs more: {error}") from error

    def total(sums: Sequence[float]) -> float:
        numbers = [int(x) for x in sums]
        return BLEU.compute_bleu(
            sys_len=numbers[0],
            ref_len=numbers[1],
            correct=numbers[2 : 2 + max_ngram_order],
            total=numbers[2 + max_ngram_order :],
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            effective_order=effective_order,
            max_ngram_order=max_ngram_order,
        ).score

    return Sums([_counts(counting, p, t) for p, t in zip(predictions, targets, strict=True)], total)


def _counts(counting: BLEU, prediction: Any, target: Any) -> list[float]:
    """Lengths of the answer and of the reference nearest to it, n-grams matched, n-grams said."""
    answer = "" if prediction is None else text_of(prediction, "bleu")
    found = counting.sentence_score(answer, accepted(target, "bleu"))
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _check(tokenize: str, smooth_method: str, smooth_value: float | None, max_ngram_order: int) -> None:
    from sacrebleu.metrics.bleu import BLEU

    for name, value, known in (
        ("tokenize", tokenize, list(BLEU.TOKENIZERS)),
        ("smooth_method", smooth_method, list(BLEU.SMOOTH_DEFAULTS)),
    ):
        if value not in known:
            raise InvalidCall(
                f"bleu: {name} is {value!r:.100}{near(str(value), known)}; sacrebleu has {', '.join(known)}"
            )
    if not _is_number(max_ngram_order, int) or max_ngram_order < 1:
        raise InvalidCall(
            f"bleu: max_ngram_order is a whole number from 1 (4 is usual), not {max_ngram_order!r}"
        )
    if smooth_value is not None and not (_is_number(smooth_value, int | float) and smooth_value >= 0):
        raise InvalidCall(f"bleu: smooth_value is a number from 0, or None, not {smooth_value!r:.100}")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


MEASURE = Measure(score, kind="sums", range=(0.0, 100.0))
