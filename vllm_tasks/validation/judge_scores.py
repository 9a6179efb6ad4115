"""Judge scores: another model scores each answer by a rubric, with structured output.

A judge can be manipulated by the text that it judges, and it has preferences of its own. Compare it with the
scores of people before its figures decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
from prefect.blocks.core import Block

from vllm_tasks.calls.call import Model, TableCall
from vllm_tasks.datalayer import exact_json
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.judge import check_scale, judge_messages, judge_schema
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.validation import Metric
from vllm_tasks.validation.predictions import Incomplete, Own, Round, Row, Source, predict_id_of, read
from vllm_tasks.validation.snapshot import Snapshot

SCALE = 1, 5


@runtime_checkable
class Judge(Model, Protocol):
    """A model that can be copied and changed into a judge."""

    @property
    def predict_kwargs(self) -> dict[str, Any]: ...
    def model_copy(self, *, update: Mapping[str, Any]) -> Judge: ...


@dataclass(frozen=True)
class JudgeScores:
    """A judge's score for each answer of a model. A failed row is not judged and stays failed."""

    judged: Own
    over: TableCall
    """The call that makes the requests to the judge."""
    predict_id: str

    @classmethod
    def of(cls, judged: Own, metric: Metric, dataset: str) -> JudgeScores:
        """Raises `InvalidCall` for a metric without a rubric or a judge."""
        over = _judge_call(metric)
        model = judged.over.call.identifier
        # Scores by another rubric, scale or judge are not comparable, so they have a table of their own.
        suffix = f"{metric.identifier}-{over.fingerprint[:8]}"
        return cls(judged, over, predict_id_of(model, dataset, over.decoder, suffix))

    def needed(self) -> list[Source]:
        return [self.judged, self]

    def check(self, snapshot: Snapshot) -> None:
        """Nothing to do: the answers to judge do not exist yet."""

    def process(self, round_: Round, snapshot: Snapshot) -> int:
        answers = self.judged.answers(round_.home, round_.run, snapshot)
        pairs = [(c, a) for c, a in zip(snapshot.cases, answers, strict=True) if a.prediction is not None]
        if not pairs:
            return 0
        table = f"_judged__{self.predict_id}"
        questions = [
            exact_json.dumps([case.inputs, answer.prediction, answer.target]) for case, answer in pairs
        ]
        rows = {
            "run": [round_.run] * len(pairs),
            "row": [case.row for case, _ in pairs],
            "question": questions,
        }
        round_.home.put(table, pa.table(rows), ["run", "row"])
        return round_.process(self.over, self.predict_id, table, of_run=True)

    def answers(self, home: Tables, run: str, snapshot: Snapshot) -> list[Answer]:
        rows = {row["row"]: row for row in read(home, run, self.predict_id, self.over.decoder)}
        return [_judged(answer, rows) for answer in self.judged.answers(home, run, snapshot)]


def _judged(answer: Answer, scores: Mapping[int, Row]) -> Answer:
    if answer.prediction is None:
        return answer
    if (row := scores.get(answer.row)) is None:
        raise Incomplete(f"there is no judge score for row {answer.row}")
    failed = row["_error"] is not None
    return replace(answer, prediction=None if failed else row["value"], error=row["_error"], unjudged=failed)


def _judge_call(metric: Metric) -> TableCall:
    judge = judge_of(metric)
    rubric, scale = metric.options.get("rubric"), check_scale(metric.options.get("scale", SCALE))
    if not isinstance(rubric, str) or not rubric.strip():
        raise InvalidCall(
            f"{metric.identifier!r} needs a rubric: options={{'rubric': 'A good answer is ...'}}"
        )
    scoring = judge.model_copy(
        update={
            "signature": "singleton",
            "chat": True,  # a judge is sent chat messages only
            "prompt_func": partial(_messages, rubric=rubric, scale=scale),
            "output_schema": judge_schema(scale),
            "datatype": None,
            "flatten": False,
            "model_update_kwargs": {},
            "predict_kwargs": {"temperature": 0, "max_tokens": 512, **judge.predict_kwargs},
        }
    )
    return scoring.prepare(judge_of).over("question")


def _messages(question: str, *, rubric: str, scale: tuple[int, int]) -> list[dict[str, str]]:
    inputs, prediction, target = exact_json.loads(question)
    task = inputs[0] if len(inputs) == 1 else inputs
    return judge_messages(task, prediction, target, rubric, scale)


def judge_of(metric: Metric) -> Judge:
    """The judge of a metric: a model given in Python, or a saved block by `type/name`."""
    model = metric.options.get("model")
    if isinstance(model, str) and model.startswith(("vllm-api/", "vllm-model/")):
        try:
            model = Block.load(model)
        except ValueError as error:
            raise InvalidCall(f"{metric.identifier!r}: there is no saved block {model!r}: {error}") from error
    if not isinstance(model, Judge):
        given = repr(model)[:100] if isinstance(model, str | None) else f"a {type(model).__name__}"
        raise InvalidCall(
            f"{metric.identifier!r} needs a judge, a model or a saved block: "
            f"options={{'model': 'vllm-api/NAME'}}; got {given}"
        )
    return model
