"""Values of a run from its answers, their comparison with the last passed run, and the gate's verdicts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.rows import error_in_words
from vllm_tasks.validation import Metric, Validation, history
from vllm_tasks.validation.gate import verdict
from vllm_tasks.validation.predictions import Source
from vllm_tasks.validation.report import ChangedRow, DatasetReport, Record, WorstRow
from vllm_tasks.validation.scores import Scored, compared, row_scores, score
from vllm_tasks.validation.snapshot import Snapshot
from vllm_tasks.validation.statistics import Paired

logger = logging.getLogger(__name__)

Scores = dict[str, dict[int, float | None]]


@dataclass(frozen=True)
class Judging:
    """One data set, and the source of answers for each metric."""

    validation: Validation
    home: Tables
    snapshot: Snapshot
    sources: Mapping[str, Source]

    def judged(
        self, run: str, answers: Mapping[str, list[Answer]], past: Sequence[Record]
    ) -> tuple[DatasetReport, Scores]:
        """The report of `run`, and all scores by metric and row; `answers` has the answers by predict_id."""
        on_error = self.validation.on_error
        earlier: dict[tuple[str, str], list[Answer] | None] = {}
        values, verdicts, changed, worst, tables = [], [], [], [], {}
        scores: Scores = {}
        for metric in self.validation.metrics:
            name, source = metric.identifier, self.sources[metric.identifier]
            now = answers[source.predict_id]
            scored = score(metric, now, on_error)
            values.append(scored.value)
            scores[name] = {case.row: scored.scores.get(case.row) for case in self.snapshot.cases}
            if scored.table is not None:
                tables[name] = scored.table
            worst += self._worst(metric, scored, now)
            before = history.last_passed(past, self.snapshot.hash, source.predict_id, name)
            paired = None
            if before is not None and metric.measure().kind != "set":
                key = source.predict_id, before.answers
                if key not in earlier:
                    earlier[key] = self._earlier(source, before)
                paired, rows = self._compared(metric, scored, earlier[key], now)
                changed += rows
            against = before.run if before is not None and paired is not None else None
            verdicts.append(verdict(self.validation, self.snapshot.dataset, scored.value, paired, against))
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

    def _earlier(self, source: Source, record: Record) -> list[Answer] | None:
        try:
            return source.answers(self.home, record.answers, self.snapshot)
        except InvalidCall as error:
            logger.warning("the run %s cannot be used for comparison: %s", record.run, error)
            return None

    def _compared(
        self, metric: Metric, now: Scored, before: Sequence[Answer] | None, after: Sequence[Answer]
    ) -> tuple[Paired | None, list[ChangedRow]]:
        """The comparison with the run before. It is empty if that run cannot be scored, for example because
        all its rows failed; this run is valid all the same."""
        if before is None:
            return None, []
        try:
            paired = compared(metric, before, after, self.validation.on_error)
            return paired, self._changed(metric, now, before, after)
        except InvalidCall as error:
            logger.warning("%s: the last run that passed cannot be scored: %s", metric.identifier, error)
            return None, []

    def _worst(self, metric: Metric, now: Scored, answers: Sequence[Answer]) -> list[WorstRow]:
        """The `rows_shown` worst rows. They need no other run, so the report of a first run has them too."""
        measure = metric.measure()
        sign, best = (1, measure.range[1]) if measure.higher_is_better else (-1, measure.range[0])
        wrong = [row for row, score in now.scores.items() if score != best]
        wrong.sort(key=lambda row: (sign * now.scores[row], row))
        texts = {answer.row: _answer_or_error(answer) for answer in answers}
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
        self, metric: Metric, now: Scored, before: Sequence[Answer], after: Sequence[Answer]
    ) -> list[ChangedRow]:
        """The rows whose score changed most: up to `rows_shown` regressed and as many improved ones."""
        shown = self.validation.rows_shown
        if not shown:
            return []
        then = row_scores(metric, before, self.validation.on_error)
        sign = 1 if now.value.higher_is_better else -1
        gains = {row: sign * (now.scores[row] - then[row]) for row in now.scores.keys() & then.keys()}
        order = sorted((row for row in gains if gains[row]), key=lambda row: (gains[row], row))
        regressed = [row for row in order[:shown] if gains[row] < 0]
        improved = [row for row in reversed(order[-shown:]) if gains[row] > 0]
        return [
            ChangedRow(
                row=row,
                metric=metric.identifier,
                before=then[row],
                after=now.scores[row],
                improved=gains[row] > 0,
                inputs=self.snapshot.cases[row].inputs,
                target=self.snapshot.cases[row].target,
                answer_before=_answer_or_error(before[row]),
                answer_after=_answer_or_error(after[row]),
            )
            for row in (*regressed, *improved)
        ]


def _answer_or_error(answer: Answer) -> object:
    return answer.prediction if answer.error is None else error_in_words(answer.error)
