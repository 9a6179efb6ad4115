"""The texts that text metrics compare: an answer's text, a target's accepted texts, and normal forms."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial
from typing import Any, Literal, get_args

from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.errors import InvalidCall, near

Step = Literal[
    "lower",
    "upper",
    "punctuation",
    "unicode_punctuation",
    "digits",
    "articles",
    "whitespace",
    "strip",
    "squad",
]
"""The names of steps that change a text; `{"remove": pattern}` is a step too."""

SCALAR = str, int, float, Decimal
"""The types of a target, or of one of its texts."""
ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)
JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]{1,4})?")
DIGITS = str.maketrans("", "", string.digits)


def _without_unicode_punctuation(text: str) -> str:
    return "".join(sign for sign in text if not unicodedata.category(sign).startswith("P"))


STEPS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "punctuation": lambda text: text.translate(PUNCTUATION),
    "unicode_punctuation": _without_unicode_punctuation,
    "digits": lambda text: text.translate(DIGITS),
    "articles": lambda text: ARTICLES.sub(" ", text),
    "whitespace": lambda text: " ".join(text.split()),
    "strip": str.strip,
}
SQUAD: tuple[Step, ...] = ("lower", "punctuation", "articles", "whitespace")
"""The steps of SQuAD's script, in its order."""


def text_of(prediction: Any, metric: str) -> str:
    """Return the text of an answer: integral numbers without a fraction (3.0 is "3"), booleans as in JSON.

    Raises `InvalidCall` for lists and objects, which `metric` cannot score.
    """
    if isinstance(prediction, list | dict):
        raise InvalidCall(
            f"{metric} compares texts, and the model's answers are data ({prediction!r:.100}): use "
            "json_fields or exact_match, or a model without output_schema"
        )
    return scalar_text(prediction)


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
    return [scalar_text(text) for text in texts]


def decimals_of(target: Any) -> list[Decimal]:
    """Return the decimals of a target, which are compared with a number by value; a text that is a number, as
    all cells of a CSV are, is one of them."""
    found = []
    for one in target if isinstance(target, list) else [target]:
        if isinstance(one, Decimal):
            found.append(one)
        elif isinstance(one, str) and JSON_NUMBER.fullmatch(one):
            found.append(Decimal(one))
    return found


def scalar_text(value: str | int | float | Decimal) -> str:
    """Return a text, number or boolean as the text that an answer would have: see `text_of`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # It uses Decimal because int(1e23) has digits that 1e23 does not print.
        whole = f"{Decimal(repr(value)):.0f}" if value.is_integer() else repr(value)
        return "0" if whole == "-0" else whole
    return plain_text(value) if isinstance(value, int | Decimal) else str(value)


def check_steps(steps: Any, what: str = "normalize") -> list[Callable[[str], str]]:
    """Return the functions of a normal form's steps. Raise `InvalidCall` for an unknown step.

    Args:
        steps: Names of steps, and `{"remove": pattern}`, which removes all matches of a pattern of `re`.
        what: The name of the option in errors.
    """
    if not isinstance(steps, list | tuple):
        raise InvalidCall(f"{what} must be a list of steps such as ['strip', 'lower'], not {steps!r:.100}")
    found: list[Callable[[str], str]] = []
    for step in steps:
        if isinstance(step, dict) and step.keys() == {"remove"}:
            found.append(partial(compiled(step["remove"], what).sub, ""))
        elif step == "squad":
            found += [STEPS[name] for name in SQUAD]
        elif isinstance(step, str) and step in STEPS:
            found.append(STEPS[step])
        else:
            raise InvalidCall(
                f"{what} has no step {step!r:.100}{near(str(step), get_args(Step))}; known are "
                f"{', '.join(get_args(Step))}, and {{'remove': pattern}}"
            )
    return found


def normalized(text: str, steps: Iterable[Callable[[str], str]]) -> str:
    """Return `text` after these steps, in their order."""
    for step in steps:
        text = step(text)
    return text


def compiled(pattern: Any, what: str) -> re.Pattern[str]:
    """Return a pattern of `re`. Raise `InvalidCall` if it is none; `what` names the metric or option."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise InvalidCall(f"{what}: {pattern!r:.200} is not a pattern of `re`: {error}") from error
