"""BLEU of the whole set, as sacrebleu's `corpus_score`: brevity penalty times the geometric mean of n-gram
precisions.

Range 0 to 100, higher is better. Papineni et al. 2002, https://aclanthology.org/P02-1040; sacrebleu: Post
2018, https://aclanthology.org/W18-6319. A row's own score uses that row alone and says little about a short
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
    """Return the counts of each row, and how BLEU follows from their sums.

    The options and their defaults are sacrebleu's.

    Args:
        predictions: The answers in row order; None, for a failed row, counts as an empty text.
        targets: The reference of each row, or a list of references.
        lowercase: Ignore case.
        tokenize: The name of sacrebleu's tokenizer.
        smooth_method: How counts of zero are smoothed.
        smooth_value: The parameter of the methods "floor" and "add-k"; None: sacrebleu's default.
        max_ngram_order: The length of the longest n-grams, in words.
        effective_order: Leave out the n-gram orders that have a precision of 0.

    Returns:
        One vector for each row, in their order, and the function from the vectors' sum to BLEU.

    Raises:
        InvalidCall: sacrebleu does not take an option, or a target or answer is not a text.
        ImportError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("bleu needs sacrebleu: pip install 'vllm-tasks[eval]'") from error
    _check(tokenize, smooth_method, smooth_value, max_ngram_order)
    try:
        # Rows are counted without smoothing, since "add-k" adds to the counts; the sums are smoothed.
        counting = BLEU(
            lowercase=lowercase,
            tokenize=tokenize,
            smooth_method="none",
            max_ngram_order=max_ngram_order,
            effective_order=True,
        )
    except (ImportError, RuntimeError) as error:  # raised for "ja-mecab", "ko-mecab" and "spm"
        raise InvalidCall(f"bleu: sacrebleu's tokenizer {tokenize!r} cannot be used: {error}") from error

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
    """Return the lengths of the answer and of its closest reference, then n-grams matched, n-grams in all."""
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
            f"bleu: max_ngram_order must be an integer of at least 1 (usually 4), not {max_ngram_order!r}"
        )
    if smooth_value is not None and not (_is_number(smooth_value, int | float) and smooth_value >= 0):
        raise InvalidCall(
            f"bleu: smooth_value must be a number of at least 0 or None, not {smooth_value!r:.100}"
        )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


MEASURE = Measure(score, kind="sums", range=(0.0, 100.0))
