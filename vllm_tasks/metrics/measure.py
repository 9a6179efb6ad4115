"""What a metric is: how an answer is scored, in which range, and which direction is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["row", "answer", "sums", "set"]
Asks = Literal["answer", "likelihood", "verdict"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one row of a dataset came to. `prediction` is None when the row failed, and only then."""

    row: int
    """Position in the frozen dataset, from 0."""
    target: Any
    prediction: Any
    """A text, or what the model's `datatype` or `output_schema` make of it, as plain JSON data."""
    error: str | None = None
    unjudged: bool = False
    """The model answered, but the judge of its answer failed: no miss of the model's."""
    truncated: bool = False
    """Cut at `max_tokens`."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    """From handing the row to the engine to its answer."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model holds a text to be, after a prompt or on its own."""

    logprob: float
    """Sum over its tokens, natural log."""
    tokens: int
    characters: int


@dataclass(frozen=True)
class Confusion:
    """How often which class was taken for which: `counts[i][j]` rows of class i were called j."""

    labels: tuple[str, ...]
    """Of the targets and of the predictions, sorted; a failed row's prediction is `failed`."""
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sums:
    """A metric of a whole set that is a function of sums over its rows, as BLEU of matches and lengths.

    `rows` has one vector for each row, all of one length; `total` makes the metric of their sum (over any
    rows, each any number of times). So resampling costs no scoring.
    """

    rows: Sequence[Sequence[float]]
    total: Callable[[Sequence[float]], float]
    table: Confusion | None = None


@dataclass(frozen=True)
class Measure:
    """One metric, as its file declares it.

    `score` is called by `kind`, always with the metric's options as keywords:

    - `row`: `score(prediction, target) -> float` (or bool); the value is the mean over rows
    - `answer`: `score(answer: Answer) -> float | None`, of what is known of a row beside its text; the value
      is the mean over rows that have one
    - `sums`: `score(predictions, targets) -> Sums`
    - `set`: `score(predictions, targets) -> float`

    In `sums` and `set` a failed row's prediction is None, and must count as a miss. Raises `InvalidCall`
    for a target or an option that it cannot take; whatever the model said is scored, never refused.
    """

    score: Callable[..., Any]
    kind: Kind = "row"
    asks: Asks = "answer"
    """What a prediction is: the model's answer, a list of `Likelihood`, or a judge's verdict."""
    range: tuple[float, float] = (0.0, 1.0)
    """Where it is 0 to 1 and all scores are one of these, the interval is Wilson's."""
    higher_is_better: bool = True
    miss: float | None = 0.0
    """The score of a failed row; None: it has none, and is left out and shown."""
