"""Several models on the same data sets, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_tasks.calls.call import check_model
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.validation import Metric, Validation, check_comparable
from vllm_tasks.validation.predictions import Calls
from vllm_tasks.validation.report import Comparison, DatasetReport, OnError, Standing, ValidationReport, Value
from vllm_tasks.validation.scores import compared, score
from vllm_tasks.validation.scoring_run import columns_of, sources_of
from vllm_tasks.validation.snapshot import read_snapshot
from vllm_tasks.validation.validated import Validated


def compare(
    models: Sequence[Validated],
    validation: Validation,
    reports: Sequence[ValidationReport],
    *,
    db: Datalayer | str | None = None,
    context: Context = None,
) -> Comparison:
    """Compare models by the runs in `reports`, each with the first model.

    No request is sent: the answers of the runs are read again, and all are scored in the same way.

    Args:
        models: Two or more models with different identifiers; the others are compared with the first.
        validation: The validation that the models were validated with.
        reports: The report of each model, in the order of `models`.
        db: The `Datalayer`, or its URL, that `validate` was given; None: the first model's own.
        context: The context that `validate` was given.

    Returns:
        The value of each model for each data set and metric, and its difference from the first model.

    Raises:
        InvalidCall: Two models have the same identifier, or the runs are not over the same rows, or not of
            these models, data sets and metrics.
    """
    if not isinstance(models, list | tuple):
        raise InvalidCall(f"models is a {type(models).__name__}: give a list of two or more models")
    for model in models:
        check_model(model)
    names = [model.identifier for model in models]
    check_comparable(names)
    if not isinstance(validation, Validation):
        raise InvalidCall(f"validation is a {type(validation).__name__}: give the one of the reports")
    if not isinstance(reports, list | tuple) or not all(isinstance(r, ValidationReport) for r in reports):
        raise InvalidCall(
            f"reports is {reports!r:.200}: give a list of what validate returned for each model"
        )
    if (reported := [report.model for report in reports]) != names:
        raise InvalidCall(f"reports are of {reported}; give those of the models, in their order: {names}")
    home = datalayer_of(db, models[0]).tables()
    try:
        standings = [
            standing
            for dataset in validation.datasets
            for standing in _standings(models, validation, dataset.identifier, reports, home, context)
        ]
    finally:
        home.close()
    return Comparison(tuple(names), tuple(standings))


def _standings(
    models: Sequence[Validated],
    validation: Validation,
    dataset: str,
    reports: Sequence[ValidationReport],
    home: Tables,
    context: Context,
) -> list[Standing]:
    found = [_of(report, validation, dataset) for report in reports]
    if len({one.dataset_hash for one in found}) > 1:
        raise InvalidCall(
            f"the models were not validated on the same rows of {dataset!r}: its source changed in "
            "between; with pin=True all runs use one snapshot"
        )
    snapshot = read_snapshot(dataset, found[0].dataset_table, columns_of(validation, models[0]), home)
    clusters = snapshot.clusters()
    answers = [
        _answers(model, validation, one, home, context) for model, one in zip(models, found, strict=True)
    ]
    standings = []
    for position, metric in enumerate(validation.metrics):
        name = metric.identifier
        for i, model in enumerate(models):
            paired = None
            if i and metric.measure().kind != "set":
                paired = compared(metric, answers[0][name], answers[i][name], validation.on_error, clusters)
            passed = found[i].verdicts[position].reason is None
            value = found[i].values[position]
            if metric.measure().kind != "set":
                _refuse_another(
                    metric, answers[i][name], value, validation.on_error, clusters, model.identifier
                )
            standings.append(Standing(dataset, name, model.identifier, value, passed, paired))
    return standings


def _refuse_another(
    metric: Metric,
    answers: Sequence[Answer],
    reported: Value,
    on_error: OnError,
    clusters: Sequence[int] | None,
    model: str,
) -> None:
    """Raise `InvalidCall` if the metric has another value than in the report: its options are others."""
    now = score(metric, answers, on_error, clusters).value
    if now.n != reported.n or not np.isclose(now.value, reported.value, equal_nan=True):
        raise InvalidCall(
            f"{metric.identifier!r} of {model!r} is {reported} in its report and {now} by this validation: "
            "give the validation that the models were validated with, or validate them again"
        )


def _of(report: ValidationReport, validation: Validation, dataset: str) -> DatasetReport:
    metrics = [metric.identifier for metric in validation.metrics]
    for found in report.datasets:
        if found.dataset == dataset:
            if [value.metric for value in found.values] == metrics:
                return found
            raise InvalidCall(
                f"{report.model!r} was validated with other metrics than {metrics}: validate it again"
            )
    raise InvalidCall(f"{report.model!r} was not validated on {dataset!r}: validate it there first")


def _answers(
    model: Validated, validation: Validation, found: DatasetReport, home: Tables, context: Context
) -> dict[str, list[Answer]]:
    snapshot = read_snapshot(found.dataset, found.dataset_table, columns_of(validation, model), home)
    sources = sources_of(
        Calls.of(model.prepare(compare, context), validation.key[0]), validation.metrics, found.dataset
    )
    return {metric: source.answers(home, found.answers, snapshot) for metric, source in sources.items()}
