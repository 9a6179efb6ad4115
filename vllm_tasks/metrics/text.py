"""The texts that text metrics compare: an answer's text, a target's accepted texts, and normal forms."""

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
"""The types of a target, or of one of its texts."""
ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)
STEPS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "punctuation": lambda text: text.translate(PUNCTUATION),
    "articles": lambda text: ARTICLES.sub(" ", text),
    "whitespace": lambda text: " ".join(text.split()),
    "strip": str.strip,
}
"""The steps in the order in which they are applied, which is that of SQuAD's script."""
SQUAD = frozenset({"lower", "punctuation", "articles", "whitespace"})


def text_of(prediction: Any, metric: str) -> str:
    """Return the text of an answer: integral numbers without a fraction (3.0 is "3"), booleans as in JSON.

    Raises `InvalidCall` for lists and objects, which `metric` cannot score.
    """
    if isinstance(prediction, list | dict):
        raise InvalidCall(
            f"{metric} compares texts, and the model's answers are data ({prediction!r:.100}): use "
            "json_fields or exact_match, or a model without output_schema"
        )
    return _scalar(prediction)


def accepted(target: Any, metric: str) -> list[str]:
    """Return the texts of a target, of which any is accepted: a single one, or those of a list.

    A decimal becomes the text that a prompt has of it (12.50). Raises `InvalidCall` for an empty list, an
    object or null.
    """
    texts = target if isinstance(target, list) else [target]
    if not texts or not all(isinstance(text, SCALAR) for text in texts):
        raise InvalidCall(
            f"{metric} takes a text, or a list of accepted texts, as target, not {target!r:.100}"
        )
    return [_scalar(text) for text in texts]


def decimals_of(target: Any) -> list[Decimal]:
    """Return the decimals of a target, which are compared with a number by value."""
    return [one for one in (target if isinstance(target, list) else [target]) if isinstance(one, Decimal)]


def _scalar(value: str | int | float | Decimal) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # It uses Decimal because int(1e23) has digits that 1e23 does not print.
        whole = f"{Decimal(repr(value)):.0f}" if value.is_integer() else repr(value)
        return "0" if whole == "-0" else whole
    return plain_text(value) if isinstance(value, int | Decimal) else str(value)


def check_steps(steps: Any) -> frozenset[str]:
    """Return the steps of a normal form, with "squad" expanded. Raise `InvalidCall` for an unknown step."""
    if not isinstance(steps, Collection) or isinstance(steps, str):
        raise InvalidCall(f"normalize must be a list of steps such as ['strip', 'lower'], not {steps!r:.100}")
    for step in steps:
        if step not in get_args(Step):
            raise InvalidCall(
                f"normalize has no step {step!r:.100}{near(str(step), get_args(Step))}; known are "
                f"{', '.join(get_args(Step))}"
            )
    return frozenset(steps) - {"squad"} | (SQUAD if "squad" in steps else frozenset())


def normalized(text: str, steps: Collection[str]) -> str:
    """Return `text` after these steps, applied in the order of `STEPS`."""
    for name, step in STEPS.items():
        if name in steps:
            text = step(text)
    return text
