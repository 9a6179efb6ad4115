"""A chain of steps that extracts the text to score from a model's answer, or from its `n` answers.

The steps do what the filters of lm-evaluation-harness do (`lm_eval/filters`, version 0.4.13), so its tasks
can be written down as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.text import Step, check_steps, compiled, normalized, scalar_text, text_of

Choose = Literal["first", "last", "majority"]
"""Steps that make one answer of several."""
Texts = list[str | None]
"""The texts of one row so far; None where nothing was found."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "regex": ("match", "fallback", "choices", "normalize"),
    "map": ("default",),
    "remove": (),
    "take": (),
}
"""The steps with a value, and their further options."""


@dataclass(frozen=True)
class Extraction:
    """A chain of steps, in their order. See `extraction`."""

    steps: tuple[Callable[[Texts, list[str]], Texts], ...] = ()
    choices: str | None = None
    """The column of a row's choices, if a step needs them."""
    may_miss: bool = False
    """Whether it may find nothing in an answer."""

    def __call__(self, prediction: Any, choices: Sequence[Any] | None, metric: str) -> str | None:
        """Extract the text of one row; None if nothing was found.

        Args:
            prediction: The model's answer, or the list of its `n` answers.
            choices: The choices of the row.
            metric: The metric's name, for errors.

        Raises:
            InvalidCall: The answer is data, several answers remain, or the choices are not texts.
        """
        answers = prediction if isinstance(prediction, list) else [prediction]
        texts: Texts = [text_of(answer, metric) for answer in answers]
        of_row = [] if self.choices is None else texts_of_choices(choices, metric)
        for step in self.steps:
            texts = step(texts, of_row)
        if len(texts) != 1:
            raise InvalidCall(
                f"{metric} scores one text, and extract leaves {len(texts)} answers: add the step 'first', "
                "'last' or 'majority'"
            )
        return texts[0]


def extraction(steps: Sequence[Any]) -> Extraction:
    """Return the chain of these steps.

    - The names of `exact_match`'s `normalize` ("lower", "strip", ...) and `{"remove": pattern}`.
    - `{"regex": pattern}`: the first match of a pattern of `re`, as `found` has it; `"match": -1` is the last
      one, and so on. Without a match it is `"fallback"`, a text; without that, nothing is found. With
      `"choices": column` an answer that names a choice by its text is found too, as `found_choice` has it;
      `"normalize"` is for the comparison with these texts.
    - `{"map": {text: text, ...}}`: other texts become `"default"`; without that, nothing is found.
    - `{"take": k}`: the first k of n answers. "first" and "last" choose one; "majority" chooses the text that
      most of them have, and of equally frequent ones that of the first answer.

    Raises:
        InvalidCall: A step or an option is unknown or not valid, or two steps name different columns.
    """
    parts = [_named(step) if isinstance(step, str) else _of_dict(step) for step in steps]
    columns = {
        step["choices"] for step in steps if isinstance(step, dict) and step.get("choices") is not None
    }
    if len(columns) > 1:
        raise InvalidCall(f"extract names several columns of choices, {sorted(columns)}: use one")
    may_miss = False
    for step in steps:
        if isinstance(step, dict) and "regex" in step:
            may_miss = step.get("fallback") is None
        elif isinstance(step, dict) and "map" in step:
            may_miss = step.get("default") is None
    return Extraction(tuple(parts), next(iter(columns), None), may_miss)


def found(pattern: re.Pattern[str], text: str, match: int = 0) -> str | None:
    """Return what a pattern finds in a text, without white space at its ends; None if it does not match.

    It is the match, or its only group, or the first of its groups that is not empty. If all of several groups
    are empty, nothing is found.

    Args:
        pattern: A pattern of `re`.
        text: The text.
        match: Which of all matches counts: 0 is the first, -1 the last.
    """
    matches = pattern.findall(text)
    if not -len(matches) <= match < len(matches):
        return None
    groups = matches[match]
    if isinstance(groups, tuple):
        groups = next((group for group in groups if group), None)
    return None if groups is None else str(groups).strip()


def found_choice(
    pattern: re.Pattern[str],
    text: str,
    choices: Sequence[str],
    normalize: Sequence[Callable[[str], str]] = (),
    match: int = 0,
) -> str | None:
    """Return the choice that a text names, as its letter in brackets, or what the pattern finds.

    It is what the pattern finds, such as "(B)"; else the letter of the choice whose text occurs; else the
    letter after a colon ("the answer: B"). This is the filter `multi_choice_regex` of lm-evaluation-harness.

    Args:
        pattern: A pattern of `re`.
        text: The text.
        choices: The texts of choices (A), (B), ... in this order.
        normalize: Steps applied to the text and to the choices before they are compared.
        match: Which of all matches counts: 0 is the first, -1 the last.
    """
    if direct := found(pattern, text, match):
        return direct
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    of_text = {normalized(c.strip(), normalize): f"({x})" for c, x in zip(choices, letters, strict=True)}
    any_choice = re.compile("|".join(map(re.escape, of_text)))
    if named := found(any_choice, normalized(text, normalize), match):
        return of_text.get(named, named)
    any_letter = re.compile(rf":\s*({'|'.join(map(re.escape, letters))})")
    letter = found(any_letter, text, match)
    return f"({letter})" if letter else None


def texts_of_choices(choices: Any, metric: str) -> list[str]:
    """The choices of a row as texts; raises `InvalidCall` unless they are a list of texts or numbers."""
    if (
        not isinstance(choices, list)
        or not choices
        or any(isinstance(c, list | dict | None) for c in choices)
    ):
        raise InvalidCall(f"{metric} needs a list of choices, and the row has {choices!r:.100}")
    return [scalar_text(choice) for choice in choices]


def _named(step: str) -> Callable[[Texts, list[str]], Texts]:
    if step in get_args(Choose):
        return lambda texts, _choices: [_chosen(step, texts)]
    if step not in get_args(Step):
        known = (*get_args(Step), *get_args(Choose))
        raise InvalidCall(
            f"extract has no step {step!r:.100}{near(step, known)}; known are {', '.join(known)}, and dicts "
            f"with {', '.join(map(repr, OPTIONS))}"
        )
    return _each(check_steps([step]))


def _of_dict(step: Any) -> Callable[[Texts, list[str]], Texts]:
    kind = next((name for name in OPTIONS if isinstance(step, dict) and name in step), None)
    if kind is None:
        raise InvalidCall(
            f"extract: {step!r:.100} is not a step; a step is a name such as 'strip', or a dict with "
            f"{', '.join(map(repr, OPTIONS))}"
        )
    for name in step.keys() - {kind}:
        if name not in OPTIONS[kind]:
            raise InvalidCall(
                f"extract: the step {kind!r} has no option {name!r:.100}{near(str(name), OPTIONS[kind])}; it "
                f"has {', '.join(OPTIONS[kind]) or 'none'}"
            )
    return {"regex": _regex, "map": _map, "remove": _remove, "take": _take}[kind](step)


def _regex(step: dict[str, Any]) -> Callable[[Texts, list[str]], Texts]:
    pattern, match, fallback = compiled(step["regex"], "extract"), step.get("match", 0), step.get("fallback")
    if not isinstance(match, int) or isinstance(match, bool):
        raise InvalidCall(f"extract: match={match!r:.100} is not the number of a match, such as 0 or -1")
    if not isinstance(fallback, str | None):
        raise InvalidCall(f"extract: fallback={fallback!r:.100} is not a text")
    normalize = check_steps(step.get("normalize", ()))
    has_choices = step.get("choices") is not None

    def one(text: str | None, choices: list[str]) -> str | None:
        if text is None:
            return fallback
        if has_choices:
            result = found_choice(pattern, text, choices, normalize, match)
        else:
            result = found(pattern, text, match)
        return fallback if result is None else result

    return lambda texts, choices: [one(text, choices) for text in texts]


def _map(step: dict[str, Any]) -> Callable[[Texts, list[str]], Texts]:
    mapping, default = step["map"], step.get("default")
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in (*mapping, *mapping.values())):
        raise InvalidCall(f"extract: map takes texts by text, not {mapping!r:.100}")
    if not isinstance(default, str | None):
        raise InvalidCall(f"extract: default={default!r:.100} is not a text")
    return lambda texts, _choices: [default if text is None else mapping.get(text, default) for text in texts]


def _remove(step: dict[str, Any]) -> Callable[[Texts, list[str]], Texts]:
    return _each(check_steps([step], "extract"))


def _take(step: dict[str, Any]) -> Callable[[Texts, list[str]], Texts]:
    k = step["take"]
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InvalidCall(f"extract: take={k!r:.100} is not a number of answers of at least 1")

    def first(texts: Texts, _choices: list[str]) -> Texts:
        if len(texts) < k:
            raise InvalidCall(
                f"extract takes {k} answers, and a row has {len(texts)}: ask for them with n={k}"
            )
        return texts[:k]

    return first


def _each(steps: Sequence[Callable[[str], str]]) -> Callable[[Texts, list[str]], Texts]:
    return lambda texts, _choices: [None if text is None else normalized(text, steps) for text in texts]


def _chosen(step: str, texts: Texts) -> str | None:
    if step == "majority":
        counts = Counter(text for text in texts if text is not None)
        return counts.most_common(1)[0][0] if counts else None
    return texts[0 if step == "first" else -1] if texts else None
