"""The definition of a metric: how it scores an answer, its range, and the direction that is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["row", "answer", "sums", "set"]
Asks = Literal["answer", "probabilities", "likelihood", "judge"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one row of a dataset. `prediction` is None if and only if the row failed."""

    row: int
    """Position in the snapshot of the dataset, from 0."""
    target: Any
    prediction: Any
    """A text, or the value that the model's `datatype` or `output_schema` makes of it, as plain JSON data."""
    error: str | None = None
    unjudged: bool = False
    """The model answered, but the judge failed on the answer. This does not count as a miss of the model."""
    truncated: bool = False
    """Truncated at `max_tokens`."""
    choices: list[Any] | None = None
    """The choices of the row, if the validation has a column of them."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    """Time from handing the row to the engine to its completion."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The likelihood of a text under the model, after a prompt or on its own."""

    logprob: float
    """Sum over the tokens, natural log."""
    tokens: int
    characters: int


@dataclass(frozen=True)
class Confusion:
    """A confusion table: `counts[i][j]` rows of class i were predicted as class j."""

    labels: tuple[str, ...]
    """The classes of the targets and of the predictions, sorted; a failed row is predicted as `failed`."""
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Bin:
    """The rows whose label has a probability above `low` and up to `high`."""

    low: float
    high: float
    rows: int
    probability: float
    """The mean probability of their labels."""
    right: float
    """The fraction of them whose label is right."""


@dataclass(frozen=True)
class Reliability:
    """How often labels are right, by their probability; bins without rows are left out."""

    bins: tuple[Bin, ...]


Table = Confusion | Reliability
"""What a metric shows on the page of a validation besides its value."""


@dataclass(frozen=True)
class Sums:
    """A metric of a whole set that is a function of sums over its rows, as BLEU is of matches and lengths.

    `rows` has one vector for each row, all of the same length. `total` calculates the metric from the sum of
    vectors, of any rows, each any number of times. So resampling scores no row again.
    """

    rows: Sequence[Sequence[float]]
    total: Callable[[Sequence[float]], float]
    table: Table | None = None
    pseudo: Sequence[Sequence[float]] = ()
    """Rows that did not occur and might have, such as a missed row of each class: they widen the interval and
    do not change the value."""
    excess: float = 0.0
    """How much too high chance alone makes the value, at most, in 95 of 100 sets: a sum of absolute
    differences is never below 0."""
    approximate: str | None = None
    """Why the interval is only approximate, for people; None if it is not."""


@dataclass(frozen=True)
class Measure:
    """One metric, as its file declares it.

    `kind` determines how `score` is called, always with the metric's options as keywords:

    - `row`: `score(prediction, target) -> float` (or bool); the value is the mean over rows
    - `answer`: `score(answer: Answer) -> float | None`, for scores of more than the text; the value is the
      mean over rows that have a score
    - `sums`: `score(predictions, targets) -> Sums`
    - `set`: `score(predictions, targets) -> float`

    In `sums` and `set`, a failed row's prediction is None and must count as a miss. `score` raises
    `InvalidCall` for a target or an option that it cannot use. It scores every answer and refuses none.
    """

    score: Callable[..., Any]
    kind: Kind = "row"
    asks: Asks = "answer"
    """The type of a prediction: the model's answer, its label with probabilities, a list of `Likelihood`, or
    a judge's reply."""
    range: tuple[float, float] = (0.0, 1.0)
    """The lowest and highest value. If they are 0 and 1, and so is each score, the interval is Wilson's."""
    higher_is_better: bool = True
    miss: float | None = 0.0
    """The score of a failed row. None: the row is left out, and reported as such."""
    undefined: str = ""
    """What a set must have for the metric to be defined, for the error where it is nan."""
    of_load: bool = False
    """Whether the load of the engine moves the scores of all rows at once. Then rows are no evidence that two
    runs differ, and a run counts as one observation."""
    takes: Callable[[Any], bool] | None = None
    """Whether an answer counts; None: all do. Others are left out, and `n` has the rows that count."""
