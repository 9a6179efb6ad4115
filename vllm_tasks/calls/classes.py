"""Classes as answers: the model names one by a letter, and the letters' probabilities are those of classes.

The mechanism is that of vLLM's structured decisions (`vllm.entrypoints.generate.structured_decisions`): the
prompt lists the classes by letter, and the answer is one token, constrained to the letters.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_tasks.calls.datatypes import AnswerType, Undecodable
from vllm_tasks.datalayer.selection import CLASS_COLUMNS, REVIEW, OutputColumn
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Choice

LETTERS = string.ascii_uppercase
LAST_LINE = "Answer with the letter of one option only."
MOST_LOGPROBS = 20
"""The default of vLLM's `max_logprobs`, and the limit of OpenAI's `top_logprobs`."""
EXCLUDED = {
    *("n", "max_completion_tokens", "min_tokens", "ignore_eos", "top_logprobs", "return_tokens_as_token_ids"),
    *("response_format", "tools", "tool_choice", "echo", "use_beam_search", "stop", "stop_token_ids"),
    *("allowed_token_ids", "logit_bias", "bad_words"),
}
"""Parameters that would make an answer something other than one of the letters, or hide its probability."""
LABEL, PROBABILITY, PROBABILITIES = (column.name for column in CLASS_COLUMNS)


class Option(BaseModel):
    """One class: its name, which is the label of a row, and what it means."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(title="Name", description="The label of rows of this class.")
    description: str = Field(default="", title="Description", description="What it means, for the model.")


class Classes(BaseModel):
    """The classes of which an answer names one, with a probability.

    As `datatype`, it makes an answer of three values: `label`, `probability` and `probabilities`. The prompt
    ends with a line for each class ("A: bug - something is broken"), and the answer is the letter of one.

    Args:
        classes: 2 to 26 names, or a mapping of names to descriptions.
        review_below: Mark rows whose label has a lower probability, in the column `_review`.
    """

    model_config = ConfigDict(extra="forbid")

    classes: list[Option] = Field(
        title="Classes", description="2 to 26 classes, in the order of their letters."
    )
    review_below: float | None = Field(
        default=None,
        gt=0,
        le=1,
        title="Review below",
        description="Rows whose label has a lower probability are marked for a person, in _review.",
    )

    # `others` are refused by the model, by name: pydantic hands it what it was asked to validate.
    def __init__(
        self,
        classes: Sequence[str | Option] | Mapping[str, str | None] | None = None,
        review_below: float | None = None,
        **others: Any,
    ) -> None:
        super().__init__(classes=classes, review_below=review_below, **others)

    @field_validator("classes", mode="before")
    @classmethod
    def _as_options(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return [{"name": name, "description": text or ""} for name, text in value.items()]
        if not isinstance(value, list | tuple):
            raise ValueError(
                f"classes is a {type(value).__name__}: give a list of names, or a dict of names and "
                "descriptions"
            )
        return [{"name": each} if isinstance(each, str) else each for each in value]

    @field_validator("classes")
    @classmethod
    def _some_classes(cls, value: list[Option]) -> list[Option]:
        if len(value) < 2:
            raise ValueError(f"there are {len(value)} classes, and an answer is one of at least 2")
        if len(value) > len(LETTERS):
            raise ValueError(
                f"there are {len(value)} classes, and each needs one of {len(LETTERS)} letters: group them "
                "and classify in two steps, or take an output_schema with an enum, without a probability"
            )
        seen: dict[str, str] = {}
        for option in value:
            if not option.name.strip() or not option.name.isprintable():
                raise ValueError(f"the class {option.name!r:.100} is blank or has a line end; give it a name")
            if other := seen.get(as_compared := option.name.strip().casefold()):
                raise ValueError(
                    f"the classes {other!r:.100} and {option.name!r:.100} are one: metrics ignore case and "
                    "white space around it; rename one of them"
                )
            seen[as_compared] = option.name
        return value

    @property
    def names(self) -> list[str]:
        """The names of the classes, in the order given."""
        return [option.name for option in self.classes]

    @property
    def lines(self) -> str:
        """The lines at the end of each prompt."""
        options = [
            f"{letter}: {option.name} - {option.description}"
            if option.description
            else f"{letter}: {option.name}"
            for letter, option in zip(LETTERS, self.classes, strict=False)
        ]
        return "\n".join([*options, LAST_LINE])

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters of each request. The likeliest tokens are the letters, as vLLM takes the
        log-probabilities after it has excluded all others."""
        return {
            "max_tokens": 1,
            "temperature": 0,
            "structured_outputs": {"choice": list(LETTERS[: len(self.classes)])},
            "logprobs": min(len(self.classes), MOST_LOGPROBS),
        }


def class_type(own: Classes) -> AnswerType:
    """Return the answer type of classes."""
    names = own.names
    letters = LETTERS[: len(names)]

    def read(choice: Choice) -> dict[str, Any]:
        logprobs = _logprobs(choice, letters)
        weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
        probabilities = [weight / math.fsum(weights) for weight in weights]
        best = max(range(len(names)), key=probabilities.__getitem__)
        review = {} if own.review_below is None else {REVIEW: probabilities[best] < own.review_below}
        return {
            LABEL: names[best],
            PROBABILITY: probabilities[best],
            PROBABILITIES: dict(zip(names, probabilities, strict=True)),
            **review,
        }

    columns = CLASS_COLUMNS if own.review_below is None else (*CLASS_COLUMNS, OutputColumn(REVIEW, "bool"))
    return AnswerType(
        columns,
        read,
        identity=lambda: {"classes": names, "lines": own.lines, "review_below": own.review_below},
        by_name=True,
        may_be_list=False,
        sampling=own.sampling,
        ending=own.lines,
        thinks=False,
    )


def _logprobs(choice: Choice, letters: str) -> list[float]:
    """Return the log probability of each letter. "A" and " A" are two tokens that read alike: the best
    counts, as in vLLM. A letter that is not among the likeliest tokens has -inf."""
    answer = choice.text.strip()
    if answer not in [*letters]:
        raise Undecodable(
            f"is none of the letters A to {letters[-1]}: the server has not applied structured_outputs (vLLM "
            "does since 0.12), or the model thinks before it answers"
        )
    if not choice.logprobs or not choice.logprobs[0].top:
        raise Undecodable("came without top_logprobs, of which the probability is made: use a vLLM server")
    best = dict.fromkeys(letters, -math.inf)
    first = choice.logprobs[0]
    for token, logprob in [(first.token, first.logprob), *first.top]:
        if (letter := token.strip()) in best and logprob > best[letter]:  # NaN is never greater
            best[letter] = logprob
    found = list(best.values())
    if max(found) == -math.inf:
        raise Undecodable(
            "came with top_logprobs that have none of the letters, so no class has a probability"
        )
    if not math.isfinite(best[answer]) or max(found) == math.inf:
        raise Undecodable(
            f"came with a log-probability of {answer} that is not a finite number, so no class has a "
            "probability"
        )
    return found


def check_sampling(sampling: Mapping[str, Any], needed: Mapping[str, Any], *, legacy: bool) -> None:
    """Raise `InvalidCall` for sampling parameters that contradict those that an answer type needs."""
    if not needed:
        return
    if legacy:
        raise InvalidCall(
            "datatype=Classes needs log-probabilities, which /generate does not return: use the "
            "server's base URL"
        )
    for name, value in sampling.items():
        set_otherwise = name in needed and value != needed[name]
        if set_otherwise or (name in EXCLUDED and not (name == "n" and value in (None, 1))):
            raise InvalidCall(
                f"{name}={value!r:.100} does not go with datatype=Classes, whose answers are one token with "
                "its log-probabilities: leave it out"
            )


def is_of_classes(columns: Iterable[OutputColumn]) -> bool:
    """Return whether answers with these columns are classes with probabilities, however they were made."""
    return tuple(columns)[: len(CLASS_COLUMNS)] == CLASS_COLUMNS
