"""REPAIR: what a second attempt with the reason buys, on the demo's questions.

The demo's model must answer in at most `WORDS` words, which a `check` holds; a longer answer is an error, or
with `repair=1` goes back to the model with the reason. Both models are validated on the same rows, an error
counts as a miss, and the difference of the accuracies is paired, with the interval of `compare`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.options import Options
from flows.demo import QUESTIONS, is_right
from vllm_tasks import Dataset, Metric, Validation, VllmModel
from vllm_tasks.validation.comparison import compare

WORDS = 3


def in_few_words(value: str, row: str) -> str | None:
    count = len(value.split())
    return f"it has {count} words, and at most {WORDS} are allowed" if count > WORDS else None


def measure(options: Options) -> Iterator[str]:
    """Two lines: the difference of the accuracies, and how many rows were repaired for how many tokens."""
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    engine = options.engine_args()
    once = VllmModel(
        identifier="once",
        model_name=engine.pop("model"),
        vllm_kwargs=engine,
        system=f"Answer in at most {WORDS} words.",
        check=in_few_words,
        predict_kwargs={"temperature": 0, "max_tokens": 32},
    )
    again = once.model_copy(update={"identifier": "again", "repair": 1})
    validation = Validation(
        datasets=[Dataset(identifier="questions", raw_data=rows)],
        metrics=[Metric(identifier="right", object=is_right)],
        key=("question", "accept"),
    )
    with tempfile.TemporaryDirectory() as lake, once, again:
        models = [once, again]
        reports = [model.validate(validation, db=lake, max_failed=None) for model in models]
        first, second = compare(models, validation, reports, db=lake).standings
        failed = [report.datasets[0].failed for report in reports]
        counted = again.predict_in_db("question", _source(lake, rows), db=lake, max_failed=None)
    assert second.paired is not None
    yield (
        f"REPAIR {100 * second.paired.difference:+.1f} points of accuracy by repair=1, 95 % interval "
        f"{100 * second.paired.low:+.1f} to {100 * second.paired.high:+.1f}: {second.value.value:.3f} and "
        f"{first.value.value:.3f}, {len(rows)} rows; {failed[0]} errors without, {failed[1]} with"
    )
    yield (
        f"REPAIR {counted.repaired}/{counted.reasked} rows repaired of those that were sent again, of "
        f"{len(rows)}; {counted.completion_tokens} output tokens in all"
    )


def _source(lake: str, rows: list[dict[str, object]]) -> str:
    with (Path(lake) / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return "rows"
