"""Values of a run from its answers, their comparison with the last passed run, and the gate's verdicts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.rows import error_in_words
from vllm_tasks.validation import Metric, Validation, history
from vllm_tasks.validation.gate import against_runs, corrected, number_of_tests, verdict
from vllm_tasks.validation.predictions import Source
from vllm_tasks.validation.report import Against, ChangedRow, DatasetReport, Record, WorstRow
from vllm_tasks.validation.retrieval import ranked
from vllm_tasks.validation.scores import SEED, Scored, row_scores, score, sides_of
from vllm_tasks.validation.snapshot import Snapshot
from vllm_tasks.validation.statistics import ALPHA, Sides, familywise, paired

logger = logging.getLogger(__name__)

Scores = dict[str, dict[int, float | None]]
FEW_RUNS = (
    "load moves all rows of a run, which is thus one observation: of {} earlier runs needed, there are {}"
)


@dataclass(frozen=True)
class _Earlier:
    """An earlier run beside this one, by metric."""

    answers: dict[str, list[Answer]]
    scores: dict[str, dict[int, float]]
    sides: dict[str, Sides]
    p_worse: dict[str, float]
    """Those of all metrics with a limit, as one test."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of runs over one data set, with the source of answers for each metric."""

    validation: Validation
    home: Tables
    snapshot: Snapshot
    sources: Mapping[str, Source]

    def evaluated(
        self, run: str, answers: Mapping[str, list[Answer]], past: Sequence[Record]
    ) -> tuple[DatasetReport, Scores]:
        """The report of `run`, and all scores by metric and row; `answers` has the answers by predict_id."""
        on_error, clusters = self.validation.on_error, self.snapshot.clusters()
        by_metric = {name: answers[source.predict_id] for name, source in self.sources.items()}
        scored = {
            metric.identifier: score(metric, by_metric[metric.identifier], on_error, clusters)
            for metric in self.validation.metrics
        }
        against, changed = self._against(scored, answers, past, clusters)
        worst = [
            row
            for metric in self.validation.metrics
            for row in self._worst(metric, scored[metric.identifier], by_metric[metric.identifier])
        ]
        values = [one.value for one in scored.values()]
        verdicts = [
            verdict(self.validation, self.snapshot.dataset, value, *against[value.metric]) for value in values
        ]
        rows = [case.row for case in self.snapshot.cases]
        scores = {name: {row: one.scores.get(row) for row in rows} for name, one in scored.items()}
        tables = {name: one.table for name, one in scored.items() if one.table is not None}
        own = answers[next(iter(answers))]
        report = DatasetReport(
            dataset=self.snapshot.dataset,
            dataset_hash=self.snapshot.hash,
            dataset_table=self.snapshot.table,
            run=run,
            rows=len(self.snapshot.cases),
            failed=sum(answer.prediction is None for answer in own),
            truncated=sum(answer.truncated for answer in own),
            outputs=self.home.where(outputs_name(next(iter(answers)))),
            processed=0,
            values=tuple(values),
            verdicts=tuple(verdicts),
            history=tuple(past),
            changed=tuple(changed),
            worst=tuple(worst),
            tables=tables,
        )
        return report, scores

    def _against(
        self,
        scored: Mapping[str, Scored],
        answers: Mapping[str, list[Answer]],
        past: Sequence[Record],
        clusters: Sequence[int],
    ) -> tuple[dict[str, tuple[list[Against], str | None]], list[ChangedRow]]:
        """By metric: the comparisons with its baselines, and why these cannot show a loss if they cannot. And
        the rows that changed since the last run that passed."""
        dataset = self.snapshot.dataset
        tests = number_of_tests(self.validation, dataset)
        earlier: dict[str, _Earlier] = {}
        found: dict[str, tuple[list[Against], str | None]] = {}
        changed: list[ChangedRow] = []
        for metric in self.validation.metrics:
            name, measure = metric.identifier, metric.measure()
            outputs = self.sources[name].predict_id
            records = history.comparable(past, self.snapshot.hash, outputs, name)
            threshold, limit = self.validation.limits(dataset, name)
            chosen = history.baselines(records, self.validation.baseline, threshold)
            if not chosen or measure.kind == "set":
                found[name] = [], None
                continue
            if measure.of_load:
                among = against_runs(scored[name].value, chosen[0], records, tests)
                few = tests / (1 + len(records)) > ALPHA
                found[name] = (
                    [among],
                    FEW_RUNS.format(math.ceil(tests / ALPHA) - 1, len(records)) if few else None,
                )
                continue
            limited = limit is not None
            # As many as there could be: whether two are one run depends on their values, which is chance.
            two = self.validation.baseline == "best" and sum(record.passed for record in records) > 1
            most = 2 if two else len(chosen)
            pairs = []
            for baseline in chosen if limited else chosen[:1]:
                run = baseline.record.answers
                if run not in earlier:
                    earlier[run] = self._earlier(run, answers, scored, clusters)
                if name not in earlier[run].sides:
                    continue
                p = corrected(earlier[run].p_worse[name], baseline, most, tests) if limited else None
                both = paired(earlier[run].sides[name], clusters, SEED)
                pairs.append(Against(baseline.kind, baseline.record.run, both, p))
                if baseline is chosen[0]:
                    changed += self._changed(metric, scored[name], earlier[run], answers[outputs])
            found[name] = pairs, None
        return found, changed

    def _earlier(
        self,
        run: str,
        now: Mapping[str, list[Answer]],
        scored: Mapping[str, Scored],
        clusters: Sequence[int],
    ) -> _Earlier:
        """An earlier run beside this one. Metrics by which it cannot be scored are left out, for example
        because all its rows failed; this run is valid all the same."""
        on_error = self.validation.on_error
        read: dict[str, list[Answer]] = {}
        before: dict[str, list[Answer]] = {}
        scores: dict[str, dict[int, float]] = {}
        sides: dict[str, Sides] = {}
        for metric in self.validation.metrics:
            name, source = metric.identifier, self.sources[metric.identifier]
            if metric.measure().kind == "set" or metric.measure().of_load:
                continue
            try:
                if source.predict_id not in read:
                    read[source.predict_id] = source.answers(self.home, run, self.snapshot)
                before[name] = read[source.predict_id]
                scores[name] = row_scores(metric, before[name], on_error)
                known = scores[name], scored[name].scores
                sides[name] = sides_of(metric, before[name], now[source.predict_id], on_error, known)
            except InvalidCall as error:
                logger.warning(
                    "%s: the run %s cannot be scored, so it cannot be used for comparison: %s",
                    name,
                    run,
                    error,
                )
        limited = [n for n in sides if self.validation.limits(self.snapshot.dataset, n)[1] is not None]
        p_worse = familywise([sides[name] for name in limited], clusters, SEED)
        return _Earlier(before, scores, sides, dict(zip(limited, p_worse, strict=True)))

    def _worst(self, metric: Metric, now: Scored, answers: Sequence[Answer]) -> list[WorstRow]:
        """The `rows_shown` worst rows. They need no other run, so the report of a first run has them too.

        There are none if all rows have one score, unless it is the lowest that there is.
        """
        measure = metric.measure()
        sign, *ends = (1, *measure.range) if measure.higher_is_better else (-1, *reversed(measure.range))
        lowest, best = ends
        if len(there := set(now.scores.values())) == 1 and lowest not in there:
            return []
        wrong = [row for row, score in now.scores.items() if score != best]
        wrong.sort(key=lambda row: (sign * now.scores[row], row))
        texts = _shown(metric, answers)
        return [
            WorstRow(
                row=row,
                metric=metric.identifier,
                score=now.scores[row],
                inputs=self.snapshot.cases[row].inputs,
                target=self.snapshot.cases[row].target,
                answer=texts[row],
            )
            for row in wrong[: self.validation.rows_shown]
        ]

    def _changed(
        self, metric: Metric, now: Scored, before: _Earlier, after: Sequence[Answer]
    ) -> list[ChangedRow]:
        """The rows whose score changed most: up to `rows_shown` regressed and as many improved ones."""
        shown = self.validation.rows_shown
        if not shown:
            return []
        then = before.scores[metric.identifier]
        sign = 1 if now.value.higher_is_better else -1
        gains = {row: sign * (now.scores[row] - then[row]) for row in now.scores.keys() & then.keys()}
        order = sorted((row for row in gains if gains[row]), key=lambda row: (gains[row], row))
        regressed = [row for row in order[:shown] if gains[row] < 0]
        improved = [row for row in reversed(order[-shown:]) if gains[row] > 0]
        texts_before, texts_after = _shown(metric, before.answers[metric.identifier]), _shown(metric, after)
        return [
            ChangedRow(
                row=row,
                metric=metric.identifier,
                before=then[row],
                after=now.scores[row],
                improved=gains[row] > 0,
                inputs=self.snapshot.cases[row].inputs,
                target=self.snapshot.cases[row].target,
                answer_before=texts_before[row],
                answer_after=texts_after[row],
            )
            for row in (*regressed, *improved)
        ]


def _shown(metric: Metric, answers: Sequence[Answer]) -> dict[int, object]:
    """By row, what people are shown: the answer, the ranking that is made of a vector, or the error."""
    return {
        answer.row: answer.prediction if answer.error is None else error_in_words(answer.error)
        for answer in ranked(metric, answers)
    }
