"""Exact match: 1 if the answer equals the target, else 0; the value is the share of rows that do.

Range 0 to 1, higher is better. Texts are equal character by character unless `normalize` says otherwise;
with ["squad"] it is the exact match of SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.data import data_of, same
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import SCALAR, Step, accepted, check_steps, decimals_of, normalized, text_of


def score(prediction: Any, target: Any, *, normalize: Sequence[Step] = ()) -> bool:
    """Whether the answer is the target or, where that is a list, any in it.

    normalize: what is done to both texts before, whatever the order given: "lower", "punctuation" (ASCII's is
        taken out), "articles" (a, an, the are taken out), "whitespace" (runs become one space, none at the
        ends), "strip" (none at the ends), "squad" (the first four). Nothing by default.

    A number is compared as text (3.0 is "3"), and a decimal as the text that a prompt has of it (12.50), but
    by value where the answer is a number. An answer that is a list or an object is compared by its data (1 is
    1.0), unnormalized; a target that is a text is read as JSON for that, and one that is a list may be equal
    as a whole or hold the answer. Of such a list a text can only be one of its texts and numbers.
    Raises `InvalidCall` for an unknown step and a target of null.
    """
    steps = check_steps(normalize)
    if isinstance(prediction, list | dict):
        wanted = [target, *target] if isinstance(target, list) else [target]
        return any(same(prediction, data_of(one)) for one in wanted)
    if isinstance(target, dict):
        return False  # data, and the model said a text
    if isinstance(target, list):
        target = [one for one in target if isinstance(one, SCALAR)]
        if not target:
            return False
    if isinstance(prediction, int | float) and any(same(prediction, one) for one in decimals_of(target)):
        return True
    answer = normalized(text_of(prediction, "exact_match"), steps)
    return any(normalized(text, steps) == answer for text in accepted(target, "exact_match"))


MEASURE = Measure(score)
