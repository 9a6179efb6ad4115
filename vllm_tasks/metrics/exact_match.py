"""Exact match: 1 if the answer equals the target, else 0; the value is the fraction of rows that do.

Range 0 to 1, higher is better. Texts must be equal character by character unless `normalize` is set;
["squad"] gives the exact match of SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.data import data_of, same
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import SCALAR, Step, accepted, check_steps, decimals_of, normalized, text_of


def score(prediction: Any, target: Any, *, normalize: Sequence[Step | dict[str, str]] = ()) -> bool:
    """Return whether the answer equals the target, or any item of a target that is a list.

    A number is compared as text (3.0 is "3"). If the answer is a number, a decimal in the target, and a text
    that is a number as in JSON, are compared by value; else a decimal is the text that a prompt has of it
    (12.50). A list or an object as answer is compared as data (1 is 1.0) and not normalized: a target that is
    a text is then read as JSON, and a list may equal the answer or contain it. An answer that is a text can
    only equal the texts and numbers of a list.

    Args:
        prediction: The model's answer: a text, a number or data.
        target: The expected answer, or a list of accepted ones.
        normalize: Steps applied to both texts, in the order given: "lower", "upper", "punctuation" (removes
            ASCII punctuation), "unicode_punctuation" (that of all scripts, without symbols such as $),
            "digits" (removes 0 to 9), "articles" (removes a, an, the), "whitespace" (makes each run one
            space, with none at the ends), "strip" (removes it at the ends), {"remove": pattern} (removes all
            matches of a pattern of `re`). "squad" is "lower", "punctuation", "articles", "whitespace".

    Raises:
        InvalidCall: A step or its pattern is not valid, or the target is null.
    """
    steps = check_steps(normalize)
    if isinstance(prediction, list | dict):
        wanted = [target, *target] if isinstance(target, list) else [target]
        return any(same(prediction, data_of(one)) for one in wanted)
    if isinstance(target, dict):
        return False  # the target is data, and the answer is a text
    if isinstance(target, list):
        target = [one for one in target if isinstance(one, SCALAR)]
        if not target:
            return False
    number = isinstance(prediction, int | float) and not isinstance(prediction, bool)
    if number and any(same(prediction, one) for one in decimals_of(target)):
        return True
    answer = normalized(text_of(prediction, "exact_match"), steps)
    return any(normalized(text, steps) == answer for text in accepted(target, "exact_match"))


MEASURE = Measure(score)
