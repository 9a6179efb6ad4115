"""What text metrics compare: the text of an answer, the texts that a target accepts, and normal forms."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection
from decimal import Decimal
from typing import Any, Literal, get_args

from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.errors import InvalidCall, near

Step = Literal["lower", "punctuation", "articles", "whitespace", "strip", "squad"]

SCALAR = str, int, float, Decimal
"""What a target, or one of its texts, may be."""
ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)
STEPS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "punctuation": lambda text: text.translate(PUNCTUATION),
    "articles": lambda text: ARTICLES.sub(" ", text),
    "whitespace": lambda text: " ".join(text.split()),
    "strip": str.strip,
}
"""In the order in which they are taken, which is that of SQuAD's script."""
SQUAD = frozenset({"lower", "punctuation", "articles", "whitespace"})


def text_of(prediction: Any, metric: str) -> str:
    """The text of an answer: whole numbers without a fraction (3.0 is "3"), booleans as in JSON.

    Raises `InvalidCall` for lists and objects, which `metric` cannot score.
    """
    if isinstance(prediction, list | dict):
        raise InvalidCall(
            f"{metric} compares texts, and the model's answers are data ({prediction!r:.100}): take "
            "json_fields or exact_match, or a model without output_schema"
        )
    return _scalar(prediction)


def accepted(target: Any, metric: str) -> list[str]:
    """The texts of a target, of which any will do: one, or those of a list.

    A decimal is the text that a prompt has of it (12.50). Raises `InvalidCall` for an empty list, an object
    or null.
    """
    texts = target if isinstance(target, list) else [target]
    if not texts or not all(isinstance(text, SCALAR) for text in texts):
        raise InvalidCall(
            f"{metric} takes a text, or a list of accepted texts, as target, not {target!r:.100}"
        )
    return [_scalar(text) for text in texts]


def decimals_of(target: Any) -> list[Decimal]:
    """The decimals of a target, which a number is compared with by value."""
    return [one for one in (target if isinstance(target, list) else [target]) if isinstance(one, Decimal)]


def _scalar(value: str | int | float | Decimal) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # By Decimal, since int(1e23) has digits that 1e23 was never written with.
        whole = f"{Decimal(repr(value)):.0f}" if value.is_integer() else repr(value)
        return "0" if whole == "-0" else whole
    return plain_text(value) if isinstance(value, int | Decimal) else str(value)


def check_steps(steps: Any) -> frozenset[str]:
    """The steps of a normal form, "squad" spelled out. Raises `InvalidCall` for what is none."""
    if not isinstance(steps, Collection) or isinstance(steps, str):
        raise InvalidCall(f"normalize is a list of steps such as ['strip', 'lower'], not {steps!r:.100}")
    for step in steps:
        if step not in get_args(Step):
            raise InvalidCall(
                f"normalize has no step {step!r:.100}{near(str(step), get_args(Step))}; there are "
                f"{', '.join(get_args(Step))}"
            )
    return frozenset(steps) - {"squad"} | (SQUAD if "squad" in steps else frozenset())


def normalized(text: str, steps: Collection[str]) -> str:
    """`text` after those of `STEPS`, in their order."""
    for name, step in STEPS.items():
        if name in steps:
            text = step(text)
    return text
