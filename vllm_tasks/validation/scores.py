"""Values of metrics, computed from answers, with their intervals; and the comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_tasks.calls.call import TableCall
from vllm_tasks.calls.classes import is_of_classes
from vllm_tasks.calls.sampling import task_of
from vllm_tasks.errors import InvalidCall, is_of_the_row
from vllm_tasks.metrics.classes import Label
from vllm_tasks.metrics.extraction import texts_of_choices
from vllm_tasks.metrics.measure import Answer, Likelihood, Measure, Sums, Table
from vllm_tasks.validation import Metric
from vllm_tasks.validation.intervals import (
    UNKNOWN,
    Bounds,
    Interval,
    mean_interval,
    proportion,
    set_interval,
    sums_interval,
)
from vllm_tasks.validation.metric import OWN_OPTIONS, WITH_CHOICES
from vllm_tasks.validation.report import OnError, Value
from vllm_tasks.validation.retrieval import RANKED, check_documents, ranked
from vllm_tasks.validation.snapshot import Snapshot
from vllm_tasks.validation.statistics import Paired, Sides, clustered, mean_rows, paired

EMPTY: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False, "vector": []}
"""Empty answers of other kinds than text."""
SEED = 0
"""The seed of all resampling, so that equal answers give equal intervals."""
SCALES: Sequence[Bounds] = ((0.0, 1.0), (1.0, 5.0), (0.0, 10.0), (0.0, 100.0))
"""Usual scales of scores, smallest first. The scores of your own function, whose range is not known, have the
first scale that holds them all and that one of them is an end of."""
LARGEST = 1e100
"""The largest score: its cube, times a number of rows, is a float."""
ENOUGH = 30
"""From so many independent rows on, an interval is reported without a warning."""
SKEWED = 5
"""A mean needs this number times the squared skewness of its scores as rows. (Cochran's rule for intervals
without a bootstrap is 25: "Sampling Techniques", 1977, 2.15.) Log-normal scores of sigma 1.5, which 100 rows
cover 91 times of 100, are beyond it, those of sigma 1 are not (`make bench-COVERAGE`)."""


@dataclass(frozen=True)
class Scored:
    """A value, and the scores of its rows."""

    value: Value
    scores: dict[int, float]
    """By row. A metric by sums gives its value over that row alone; a metric of the whole set gives none."""
    table: Table | None = None


def score(
    metric: Metric, answers: Sequence[Answer], on_error: OnError, clusters: Sequence[int] | None = None
) -> Scored:
    """The value of the metric over these answers, which are in row order.

    `clusters` has the cluster of each answer; rows of different clusters are independent. None: all rows are.

    Raises `InvalidCall` if no row is left to score, and for a score that is not a finite number.
    """
    measure = metric.measure()
    counted = _counted(metric, measure, answers, on_error)
    if measure.takes is not None:
        counted = [answer for answer in counted if measure.takes(answer.prediction)] or counted
    cluster_of = dict(zip((a.row for a in answers), clusters, strict=True)) if clusters is not None else {}
    table = None
    if measure.kind in ("row", "answer"):
        scores = _row_scores(metric, measure, counted)
        within = [cluster_of.get(row, row) for row in scores]
        value, interval, approximate = _of_rows(metric, measure, list(scores.values()), within)
    else:
        within = [cluster_of.get(answer.row, answer.row) for answer in counted]
        if measure.kind == "set":
            value, interval, scores = _of_set(metric, measure, counted, within)
            approximate = None
        else:
            sums = _sums(metric, measure, counted)
            table = sums.table
            value, interval, scores = _of_sums(metric, measure, sums, counted, within)
            approximate = sums.approximate
    return Scored(
        Value(
            metric=metric.identifier,
            value=value,
            low=interval.low,
            high=interval.high,
            n=len(within),
            failed=sum(answer.prediction is None for answer in answers),
            truncated=sum(answer.truncated for answer in answers),
            on_error=on_error,
            higher_is_better=measure.higher_is_better,
            clusters=len(set(within)),
            approximate=_too_few(len(set(within))) or approximate,
        ),
        scores,
        table,
    )


def check(metric: Metric, snapshot: Snapshot, over: TableCall) -> None:
    """Raise `InvalidCall` for options, and targets of `snapshot`, that no answer could be scored with.

    A built-in metric scores an empty answer, of the kind that `over` gives, against each target. Errors are
    thus found before a GPU is used.
    """
    measure = metric.measure()
    if metric.built_in is None or measure.asks == "judge":
        return
    of_classes = is_of_classes(over.decoder.columns)
    named = of_classes and task_of(over.call.target) == "generate"  # those of "classify" are a list
    if measure.asks == "probabilities" and not named:
        raise InvalidCall(
            f"the metric {metric.identifier!r} needs the probabilities of classes by name, and the answers "
            "have none: give the model datatype=Classes([...])"
        )
    targets: list[Any] = [case.target for case in snapshot.cases]
    kinds = {column.name: column.kind for column in over.decoder.columns}
    values = {name: EMPTY.get(kind, "") for name, kind in kinds.items()}
    if metric.built_in in RANKED and kinds == {"output": "vector"}:
        check_documents(metric, targets)
        return
    empty: Any = "" if of_classes else values["output"] if kinds.keys() == {"output"} else values
    if metric.extract:
        if isinstance(empty, dict):
            raise InvalidCall(
                f"the metric {metric.identifier!r} has extract, which takes texts, and the model's answers "
                "are data: leave out extract, or output_schema"
            )
        empty = ""
    if measure.asks == "likelihood":  # `Likelihoods.check` checks its texts
        targets, empty = [0], [Likelihood(logprob=0.0, tokens=1, characters=1)]
    if metric.chain.choices is not None:
        for case in snapshot.cases:
            with _naming(metric, f", on row {case.row}"):
                texts_of_choices(case.choices, metric.identifier)
    if measure.kind in ("sums", "set"):
        answers = [None if measure.asks == "probabilities" else empty for _ in targets]
        with _naming(metric):
            measure.score(answers, targets, **_options(metric))
    elif measure.kind == "row":
        for row, target in enumerate(targets):
            with _naming(metric, f", on row {row}"):
                measure.score(empty, target, **_options(metric, snapshot.cases[row].choices))
    elif measure.kind == "answer":
        for row, target in enumerate(targets):
            with _naming(metric, f", on row {row}"):
                measure.score(Answer(row, target, Label.of("", {})), **_options(metric))


def row_scores(metric: Metric, answers: Sequence[Answer], on_error: OnError) -> dict[int, float]:
    """The scores by row that `score` computes, without the value and its interval."""
    measure = metric.measure()
    counted = _counted(metric, measure, answers, on_error)
    if measure.kind == "set":
        return {}
    if measure.kind == "sums":
        return _scores_of_sums(_sums(metric, measure, counted), counted)
    return _row_scores(metric, measure, counted)


def sides_of(
    metric: Metric,
    before: Sequence[Answer],
    after: Sequence[Answer],
    on_error: OnError,
    scores: Sequence[Mapping[int, float]] = (),
) -> Sides:
    """Two runs over the same rows by one metric; both are scored alike.

    `scores` are the `row_scores` of both if they are known already.

    Raises `InvalidCall` for a metric of whole sets, which has no rows, and for a run with nothing to score.
    """
    measure = metric.measure()
    if measure.kind == "set":
        raise InvalidCall(f"{metric.identifier!r} scores whole sets: two runs cannot be compared row by row")
    better = measure.higher_is_better
    if measure.kind == "sums":
        # One call for both runs gives their sums the same columns, such as the cells of a confusion table.
        sums = _sums(metric, measure, _extracted(metric, [*before, *after]))
        both = np.asarray(sums.rows, dtype=np.float64)
        for i, answer in enumerate([*before, *after]):
            if _is_left_out(measure, answer, on_error):
                both[i] = 0.0
        return Sides(both[: len(before)], both[len(before) :], sums.total, better, measure.range)
    old, new = scores or (row_scores(metric, side, on_error) for side in (before, after))
    bounds = _bounds(measure, [*old.values(), *new.values()])
    rows = [answer.row for answer in before]
    sides = [mean_rows([side.get(row) for row in rows]) for side in (old, new)]
    return Sides(sides[0], sides[1], higher_is_better=better, bounds=bounds)


def compared(
    metric: Metric,
    before: Sequence[Answer],
    after: Sequence[Answer],
    on_error: OnError,
    clusters: Sequence[int] | None = None,
) -> Paired:
    """The difference of two runs over the same rows, `after` minus `before`; raises as `sides_of`.

    For a metric of load it has no interval and no p-values: rows are no evidence, and two runs are too few.
    """
    sides = sides_of(metric, before, after, on_error)
    if metric.measure().of_load:
        old, new = sides.values()
        return Paired(new - old, math.nan, math.nan, math.nan, math.nan, len(before))
    return paired(sides, clusters, SEED)


def _is_left_out(measure: Measure, answer: Answer, on_error: OnError) -> bool:
    return answer.prediction is None and (on_error == "exclude" or measure.miss is None or answer.unjudged)


def _counted(metric: Metric, measure: Measure, answers: Sequence[Answer], on_error: OnError) -> list[Answer]:
    counted = [answer for answer in answers if not _is_left_out(measure, answer, on_error)]
    if not counted:
        example = next((answer.error for answer in answers if answer.error), "")
        raise InvalidCall(
            f"{metric.identifier!r} has nothing to score: all {len(answers)} rows failed, for example: "
            f"{example}"
        )
    return ranked(metric, _extracted(metric, counted))


def _extracted(metric: Metric, answers: Sequence[Answer]) -> list[Answer]:
    """The answers with the text that `extract` finds in place of the prediction; None if it finds nothing."""
    if not metric.extract:
        return list(answers)
    chain, name = metric.chain, metric.built_in or metric.identifier
    extracted = []
    for answer in answers:
        if answer.prediction is not None:
            with _naming(metric, f", on row {answer.row}"):
                answer = replace(answer, prediction=chain(answer.prediction, answer.choices, name))
        extracted.append(answer)
    return extracted


def _options(metric: Metric, choices: list[Any] | None = None) -> dict[str, Any]:
    """The keyword arguments of the metric's function; a column of choices is replaced by those of a row."""
    not_its_own = OWN_OPTIONS if metric.measure().asks == "likelihood" else ()
    options = {name: value for name, value in metric.options.items() if name not in not_its_own}
    if metric.built_in in WITH_CHOICES and options.get("choices") is not None:
        options["choices"] = texts_of_choices(choices, metric.identifier)
    return options


def _row_scores(metric: Metric, measure: Measure, counted: Sequence[Answer]) -> dict[int, float]:
    """Scores by row, without the rows for which the metric has no value."""
    scores = {}
    for answer in counted:
        options = _options(metric, answer.choices)
        if answer.prediction is None:
            assert measure.miss is not None
            found: Any = measure.miss
        elif measure.kind == "answer":
            found = measure.score(answer, **options)
        else:
            with _naming(metric, f", on row {answer.row}"):
                found = measure.score(answer.prediction, answer.target, **options)
        if found is not None or measure.kind != "answer":
            scores[answer.row] = _finite(metric, found, f" for row {answer.row}")
    if not scores:
        raise InvalidCall(f"{metric.identifier!r} has no value for any of {len(counted)} rows")
    return scores


@contextmanager
def _naming(metric: Metric, where: str = "") -> Iterator[None]:
    """Put the metric's name into an error's message, since Prefect's UI does not show exception notes."""
    try:
        yield
    except InvalidCall as error:
        raise InvalidCall(f"the metric {metric.identifier!r}{where}: {error}") from error
    except BaseException as error:
        if not is_of_the_row(error):
            raise
        kind = type(error).__name__
        raise InvalidCall(f"the metric {metric.identifier!r} failed{where}: {kind}: {error}") from error


def _defined(metric: Metric, measure: Measure, found: Any, rows: int) -> float:
    """The value of a metric over several rows. Raise `InvalidCall` if it is not defined over these."""
    if measure.undefined and isinstance(found, float) and math.isnan(found):
        raise InvalidCall(
            f"{metric.identifier!r} is not defined for these {rows} rows: {measure.undefined}; leave it out "
            "of metrics, or look at the answers"
        )
    return _finite(metric, found, "")


def _finite(metric: Metric, found: Any, where: str) -> float:
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise InvalidCall(
            f"{metric.identifier!r} returned {found!r:.100}{where}, which is not a number"
        ) from error
    except OverflowError:  # an integer or a fraction
        value = math.inf
    if not math.isfinite(value):
        raise InvalidCall(f"{metric.identifier!r} returned {value!r}{where}, which is not a finite number")
    if abs(value) > LARGEST:
        raise InvalidCall(
            f"{metric.identifier!r} returned {value!r}{where}, and an interval is computed for values up to "
            f"{LARGEST:g}: return it in another unit, or its logarithm"
        )
    return value


def _of_rows(
    metric: Metric, measure: Measure, scores: Sequence[float], clusters: Sequence[int]
) -> tuple[float, Interval, str | None]:
    value = _finite(metric, math.fsum(scores) / len(scores), "")
    bounds = _bounds(measure, scores)
    # A mean of zeros and ones is a proportion, but not where the scores are counts that are all 0 or 1.
    if bounds == (0.0, 1.0) and set(scores) <= {0.0, 1.0} and len(set(clusters)) == len(scores):
        return value, proportion(round(math.fsum(scores)), len(scores)), None
    interval = mean_interval(clustered(mean_rows(scores), clusters), bounds, SEED)
    if interval.low == interval.high:
        return value, interval, "all scores are equal, which says nothing about the scores of other rows"
    skewed = not all(map(math.isfinite, bounds)) and len(scores) < SKEWED * _skewness(scores) ** 2
    why = "a few rows decide this mean, as their scores are very large" if skewed else None
    return value, _storable(interval), why


def _skewness(scores: Sequence[float]) -> float:
    moved = np.asarray(scores) - np.mean(scores)
    deviation = float(np.sqrt(np.mean(moved**2)))
    return float(np.mean((moved / deviation) ** 3)) if deviation > 0 else 0.0


def _bounds(measure: Measure, scores: Sequence[float]) -> Bounds:
    """The metric's range or, if that is not known, the scale that the scores seem to have."""
    if measure.range != UNKNOWN:
        return measure.range
    low, high = min(scores), max(scores)
    return next(
        (s for s in SCALES if s[0] <= low and high <= s[1] and (low == s[0] or high == s[1])), UNKNOWN
    )


def _too_few(clusters: int) -> str | None:
    return f"{clusters} independent rows are too few to be precise" if clusters < ENOUGH else None


def _sums(metric: Metric, measure: Measure, answers: Sequence[Answer]) -> Sums:
    with _naming(metric):
        found = measure.score(
            [a.prediction for a in answers], [a.target for a in answers], **_options(metric)
        )
    assert isinstance(found, Sums)
    return found


def _of_sums(
    metric: Metric, measure: Measure, sums: Sums, counted: Sequence[Answer], clusters: Sequence[int]
) -> tuple[float, Interval, dict[int, float]]:
    rows = np.asarray(sums.rows, dtype=np.float64)
    value = _defined(metric, measure, sums.total([math.fsum(column) for column in rows.T]), len(rows))
    interval = sums_interval(
        clustered(rows, clusters), sums.total, measure.range, pseudo=sums.pseudo, excess=sums.excess
    )
    return value, _storable(interval), _scores_of_sums(sums, counted)


def _scores_of_sums(sums: Sums, counted: Sequence[Answer]) -> dict[int, float]:
    scores = {a.row: float(sums.total(vector)) for a, vector in zip(counted, sums.rows, strict=True)}
    return {row: value for row, value in scores.items() if math.isfinite(value)}


def _of_set(
    metric: Metric, measure: Measure, counted: Sequence[Answer], clusters: Sequence[int]
) -> tuple[float, Interval, dict[int, float]]:
    predictions, targets = [a.prediction for a in counted], [a.target for a in counted]
    options = _options(metric)

    def found(rows: Sequence[int]) -> Any:
        with _naming(metric):
            return measure.score([predictions[i] for i in rows], [targets[i] for i in rows], **options)

    def resampled(rows: Sequence[int]) -> float:
        try:
            return float(found(rows))
        except ValueError:  # some samples have no value, such as one with a single class
            return math.nan

    value = _defined(metric, measure, found(range(len(counted))), len(counted))
    members: dict[int, list[int]] = {}
    for position, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(position)
    interval = set_interval(resampled, value, list(members.values()), measure.range, SEED)
    return value, _storable(interval), {}


def _storable(interval: Interval) -> Interval:
    """An interval that is not known, as of a single row, from one end of all numbers to the other: SQLite
    keeps no nan."""
    known = math.isfinite(interval.low) and math.isfinite(interval.high)
    return interval if known else Interval(-math.inf, math.inf)
