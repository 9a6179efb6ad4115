"""A model whose answers a test decides, and the validation that it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer, refused
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.report import DatasetReport, ValidationReport
from vllm_tasks.validation.snapshot import Columns


@dataclass
class Pupil:
    """The server's answer to each prompt: `a7` to `q7` unless `says` has another."""

    says: dict[str, str] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    cuts: set[str] = field(default_factory=set)

    def __call__(self, asked: Asked) -> Reply | None:
        if not asked.body:
            return None
        if (prompt := asked.prompt) in self.refuses:
            return refused(400, "I refuse")
        text = self.says.get(prompt, "a" + prompt[1:])
        return reply(text, "length" if prompt in self.cuts else "stop", chat="messages" in asked.body)

    def misses(self, *rows: int) -> None:
        """Answer these questions wrongly, and all others right."""
        self.says = {f"q{i}": "no idea" for i in rows}


def reply(text: str, finish_reason: str = "stop", *, chat: bool = False, **more: Any) -> Reply:
    said = {"message": {"content": text}} if chat else {"text": text}
    return Reply(
        {
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": finish_reason, **said, **more}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5},
        }
    )


Make = Callable[..., VllmAPI]


def exam(rows: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"q": f"q{i}", "a": f"a{i}", **columns} for i in range(rows)]


def validation(rows: int | list[dict[str, Any]] = 10, **fields: Any) -> Validation:
    """The data set `exam`, by exact match."""
    raw_data = exam(rows) if isinstance(rows, int) else rows
    given = {
        "datasets": [Dataset(identifier="exam", raw_data=raw_data)],
        "metrics": [Metric(identifier="exact_match")],
        "key": ("q", "a"),
    }
    return Validation(**{**given, **fields})


def asked(server: ScriptedServer, since: int = 0) -> Counter[str]:
    return Counter(post.prompt for post in server.posts[since:])


def only(report: ValidationReport) -> DatasetReport:
    (found,) = report.datasets
    return found


def table(place: Place, name: str) -> list[dict[str, Any]]:
    tables = place.db.tables()
    try:
        return tables.outputs(name).to_pylist() if tables.has(name) else []
    finally:
        tables.close()


def values(place: Place) -> list[dict[str, Any]]:
    return sorted(table(place, "_metric_values"), key=lambda row: row["created_at"])


SOURCE = "SELECT id AS n, text AS q, text AS a FROM rows"


COLUMNS = Columns(("n", "q"), "a")


def sample(**fields: Any) -> Dataset:
    given = {"identifier": "d", "select": SOURCE, "sample_size": 20, "random_seed": 7}
    return Dataset(**{**given, **fields})


class Broken(Exception):
    pass


BROKEN_ON: set[str] = set()


def own(prediction: Any, target: Any) -> float:
    if target in BROKEN_ON:
        raise Broken(target)
    return float(prediction == target)


@contextmanager
def broken_on(*targets: str) -> Iterator[pytest.ExceptionInfo[Broken]]:
    """Scoring with `own` fails on these rows: they complete, and nothing is recorded."""
    BROKEN_ON.update(targets)
    try:
        with pytest.raises(InvalidCall) as raised:
            yield raised
    finally:
        BROKEN_ON.clear()


OWN = Metric(identifier="mine", object=own)


def letters(asked: Asked) -> Reply | None:
    """Each letter is a token, and later letters of the alphabet are less likely."""
    if not asked.body:
        return None
    tokens = [
        {str(ord(c)): {"logprob": -float(ord(c) % 32), "decoded_token": c, "rank": 1}} for c in asked.prompt
    ]
    return reply("", "length", prompt_logprobs=[None, *tokens[1:]])


def choosing(choices: Sequence[Any], target: Any, **options: Any) -> Validation:
    return validation(
        [{"q": "x", "a": target, "choices": choices}],
        metrics=[Metric(identifier="multiple_choice", options={"choices": "choices", **options})],
    )


def mine(function: Callable[..., Any], **fields: Any) -> Metric:
    return Metric(identifier="mine", object=function, **fields)
