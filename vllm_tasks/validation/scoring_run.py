"""One run of a validation: predict, score, compare with the last run that passed, and record."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vllm_tasks.calls.call import Call
from vllm_tasks.calls.columns import records
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.engines import sharing
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.tables.arguments import check_max_failed, datalayer_of
from vllm_tasks.tables.budget import most_failed
from vllm_tasks.tables.job import Display
from vllm_tasks.tables.log import Terminal
from vllm_tasks.validation import Dataset, Metric, Validation, history
from vllm_tasks.validation.evaluation import Evaluation
from vllm_tasks.validation.judge_scores import JudgeScores
from vllm_tasks.validation.likelihoods import Likelihoods
from vllm_tasks.validation.predictions import Calls, Own, Round, Source, predict_id_of
from vllm_tasks.validation.report import DatasetReport, Record, ValidationReport
from vllm_tasks.validation.scores import check
from vllm_tasks.validation.snapshot import Columns, Snapshot, take_snapshot
from vllm_tasks.validation.validated import Validated

logger = logging.getLogger(__name__)

OF_OWN = "answer", "probabilities"
"""What metrics ask of the model's own answers."""
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
"""A revision that always names the same weights, unlike a branch."""


def scored(
    model: Validated,
    validation: Validation,
    call: Call,
    *,
    db: Datalayer | str | None,
    datasets: Sequence[str] | None,
    resume: bool,
    reuse: bool,
    retry_failed: bool,
    max_failed: float | int | None,
    sampling_columns: Mapping[str, str] | None,
    flow_run: str | None,
    display: Callable[[str], Display] | None,
) -> ValidationReport:
    """See `vllm_tasks.validation.run.validate`."""
    chosen = _chosen(validation, datasets)
    check_max_failed(max_failed)
    if reuse and not resume:
        raise InvalidCall(
            "reuse=True scores answers of an earlier run, and resume=False processes all rows anew: give one"
        )
    if reuse:
        _refuse_unknown_weights(call.engine)
    home = datalayer_of(db, model).tables()
    try:
        own = call.of_rows.check_columns(sampling_columns)
        calls = Calls.of(call, validation.key[0], own)
        run = _Run(
            model=model,
            validation=validation,
            calls=calls,
            home=home,
            resume=resume,
            reuse=reuse,
            retry_failed=retry_failed,
            max_failed=max_failed,
            flow_run=flow_run,
            display=display or _log,
        )

        def usable(snapshot: Snapshot) -> None:
            for source in distinct_of(sources_of(calls, validation.metrics, snapshot.dataset).values()):
                source.check(snapshot)
            for metric in validation.metrics:
                check(metric, snapshot, calls.own)

        columns = columns_of(validation, model, own)
        rows = [take_snapshot(dataset, columns, home, usable) for dataset in chosen]
        history.check_baseline(validation, home, model.identifier)
        # All data sets are processed before any is recorded, so that an interrupted call resumes as a unit.
        found = run.recorded([run.found(snapshot) for snapshot in rows])
    finally:
        home.close()
    for one in found:
        model.metric_values[one.dataset] = {value.metric: value.value for value in one.values}
    return ValidationReport(model.identifier, calls.own.fingerprint, found)


def _log(_predict_id: str) -> Display:
    return Terminal()


def _chosen(validation: Validation, names: Sequence[str] | None) -> list[Dataset]:
    by_name = {dataset.identifier: dataset for dataset in validation.datasets}
    if not isinstance(names, list | tuple | None) or not all(isinstance(name, str) for name in names or ()):
        raise InvalidCall(
            f"datasets={names!r:.100} is not a list of names; the validation has {list(by_name)}"
        )
    if names is not None and not names:
        raise InvalidCall("datasets=[] names none; leave it out for all of them")
    for name in names or ():
        if name not in by_name:
            raise InvalidCall(
                f"the validation has no dataset {name!r}{near(name, by_name)}; it has {list(by_name)}"
            )
    return [by_name[name] for name in dict.fromkeys(names)] if names is not None else validation.datasets


def _refuse_unknown_weights(config: sharing.Config) -> None:
    if isinstance(config, HttpConfig):
        raise InvalidCall(
            "reuse=True: the weights of a server are not known, so earlier answers may be another model's; "
            "validate without reuse"
        )
    arguments = json.loads(config.engine_args)
    is_pinned = COMMIT_HASH.fullmatch(str(arguments.get("revision") or ""))
    if not is_pinned and not Path(arguments["model"]).is_dir():
        raise InvalidCall(
            f"reuse=True: the weights of {arguments['model']!r} may change under this name; give a local "
            "folder, or vllm_kwargs={'revision': <commit hash of 40 digits>}"
        )


def columns_of(validation: Validation, model: Validated, own: Mapping[str, str] | None = None) -> Columns:
    """The columns of inputs (parameters of rows' own among them), of the target, and of the choices."""
    X, target = validation.key  # noqa: N806 - the name in predict_in_db
    inputs, _ = records(X, model.signature)
    named = {
        m.choices for m in validation.metrics if m.choices is not None or m.built_in == "multiple_choice"
    }
    if len(named) > 1 or None in named:
        raise InvalidCall(
            "multiple_choice needs options={'choices': 'column'}, the same for all metrics with choices"
        )
    inputs = tuple(dict.fromkeys((*inputs, *(own or {}).values())))
    return Columns(inputs, target, next(iter(named), None), validation.cluster)


def sources_of(calls: Calls, metrics: Sequence[Metric], dataset: str) -> dict[str, Source]:
    """The source of each metric, in the order of `metrics` with those of the model's own answers first."""
    over = calls.own
    own = Own(over, predict_id_of(over.call.identifier, dataset, over.decoder))
    sources: dict[str, Source] = {}
    for metric in sorted(metrics, key=lambda m: m.measure().asks not in OF_OWN):
        asks = metric.measure().asks
        if asks == "likelihood":
            sources[metric.identifier] = Likelihoods.of(calls.likelihoods, metric, dataset)
        elif asks == "judge":
            sources[metric.identifier] = JudgeScores.of(own, metric, dataset)
        else:
            sources[metric.identifier] = own
    return sources


def distinct_of(sources: Iterable[Source]) -> list[Source]:
    """The sources to process, each once, after those that it depends on."""
    return list({s.predict_id: s for source in sources for s in source.needed()}.values())


@dataclass(frozen=True)
class Found:
    """The results of one data set, before they are recorded."""

    report: DatasetReport
    records: list[Record]
    scores: dict[str, dict[int, float | None]]
    """Scores by metric and row; None for a row that is left out."""


@dataclass(frozen=True)
class _Run:
    """One run of a validation."""

    model: Validated
    validation: Validation
    calls: Calls
    home: Tables
    resume: bool
    reuse: bool
    retry_failed: bool
    max_failed: float | int | None
    flow_run: str | None
    display: Callable[[str], Display]

    def found(self, snapshot: Snapshot) -> Found:
        """Process one data set: predict, score, compare."""
        sources = sources_of(self.calls, self.validation.metrics, snapshot.dataset)
        distinct = distinct_of(sources.values())
        past = history.records_of(self.home, self.model.identifier, snapshot.dataset)
        answers_run, resumed_at = self._answers_run(snapshot, distinct[0], past)
        may_fail = self._may_fail(len(snapshot.cases))
        round_ = Round(self.home, answers_run, may_fail, len(snapshot.cases), self.retry_failed, self.display)
        processed = sum(source.process(round_, snapshot) for source in distinct)
        answers = {s.predict_id: s.answers(self.home, answers_run, snapshot) for s in distinct}
        for each in answers.values():
            self._refuse_many_failed(snapshot, each, may_fail)
        scored_before = any(record.answers == answers_run for record in past)
        run = history.new_run(snapshot.hash) if scored_before else answers_run
        evaluation = Evaluation(self.validation, self.home, snapshot, sources)
        report, scores = evaluation.evaluated(run, answers, past)
        report = replace(report, processed=processed, resumed_at=resumed_at)
        return Found(report, self._records(snapshot, sources, report, answers_run), scores)

    def recorded(self, found: Sequence[Found]) -> tuple[DatasetReport, ...]:
        """Write all results to the history, as a unit for its readers."""
        history.record(
            self.home,
            [record for one in found for record in one.records],
            {(one.report.run, metric): scores for one in found for metric, scores in one.scores.items()},
        )
        return tuple(replace(one.report, history=(*one.report.history, *one.records)) for one in found)

    # ------------------------------------------------------------------ predicting

    def _answers_run(
        self, snapshot: Snapshot, first: Source, past: Sequence[Record]
    ) -> tuple[str, datetime | None]:
        """The run to resume, and the time now; or the run to score again, with `reuse`; otherwise a new one.
        The first source decides: later sources depend on it, and rows that they have no answer for are
        processed."""
        of_first = self.home, first.predict_id, snapshot.hash, first.over.fingerprint
        if self.reuse and (runs := history.runs_with_answers(*of_first)):
            return max(runs, key=history.began), None
        if run := history.interrupted(*of_first, past):
            if self.resume:
                logger.info(
                    "%s on %s: resuming the run %s, which began at %s; resume=False processes all rows anew",
                    self.model.identifier, snapshot.dataset, run,
                    f"{history.began(run):%Y-%m-%d %H:%M:%S} UTC",
                )  # fmt: skip
                return run, datetime.now(UTC)
            history.leave(self.home, run)
        return history.new_run(snapshot.hash), None

    def _may_fail(self, rows: int) -> int | None:
        """The number of these rows that may fail; None for any number."""
        allowed = self.max_failed
        if allowed is None or (isinstance(allowed, float) and allowed >= 1.0):
            return None
        return most_failed(allowed, rows) if isinstance(allowed, float) else allowed

    def _refuse_many_failed(
        self, snapshot: Snapshot, answers: Sequence[Answer], may_fail: int | None
    ) -> None:
        """Check the failed rows of all parts of the run; `Round` counts only those of the last part."""
        failed = [answer for answer in answers if answer.prediction is None]
        if failed and may_fail is not None and len(failed) > may_fail:
            raise InvalidCall(
                f"{len(failed)} of {len(answers)} rows of {snapshot.dataset!r} failed, more than "
                f"max_failed={self.max_failed!r} allows, for example: {failed[0].error}; correct the cause "
                "and validate again with retry_failed=True, or raise max_failed"
            )

    # ------------------------------------------------------------------ recording

    def _records(
        self, snapshot: Snapshot, sources: Mapping[str, Source], report: DatasetReport, answers_run: str
    ) -> list[Record]:
        at = datetime.now(UTC)
        passed = not report.reasons
        return [
            Record(
                run=report.run,
                answers=answers_run,
                metric=value.metric,
                model=self.model.identifier,
                dataset=snapshot.dataset,
                dataset_hash=snapshot.hash,
                dataset_table=snapshot.table,
                outputs=sources[value.metric].predict_id,
                fingerprint=sources[value.metric].over.fingerprint,
                value=value.value,
                low=value.low,
                high=value.high,
                n=value.n,
                failed=value.failed,
                truncated=value.truncated,
                on_error=value.on_error,
                higher_is_better=value.higher_is_better,
                passed=passed,
                reason=verdict.reason,
                compared_with=verdict.compared_with,
                uuid=self.model.uuid,
                flow_run=self.flow_run,
                created_at=at,
            )
            for value, verdict in zip(report.values, report.verdicts, strict=True)
        ]
