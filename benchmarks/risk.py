"""RISK: how accurate the labels of `Classes` are if people answer the rows with the least probability.

The demo's model sorts the demo's 300 questions into their ten topics. The rows are ordered by the probability
of their label; the line at a coverage of c has the accuracy among the c of the rows that are most probable,
with its Wilson interval. The whole curve is written to `out/risk_coverage.csv`. AURC is the mean error over
all coverages (Geifman and El-Yaniv 2017, <https://arxiv.org/abs/1705.08500>); with an order by chance it is
the error of all rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from flows.demo import QUESTIONS
from vllm_tasks import Classes, VllmModel
from vllm_tasks.validation.intervals import wilson

CURVE = Path("out") / "risk_coverage.csv"
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)


def measure(options: Options) -> Iterator[str]:
    """Yield the accuracy at some coverages, and write the curve."""
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    topics = [row["topic"].replace("_", " ") for row in rows]
    engine = options.engine_args()
    model = VllmModel(
        identifier="topics",
        model_name=engine.pop("model"),
        vllm_kwargs=engine,
        prompt="What is this question about?\n\n{input}",
        datatype=Classes(sorted(set(topics))),
    )
    with model:
        answers: list[Any] = model.predict_batches([row["question"] for row in rows])
    right = [answer["label"] == topic for answer, topic in zip(answers, topics, strict=True)]
    accuracies = curve([answer["probability"] for answer in answers], right)
    n = len(accuracies)
    CURVE.parent.mkdir(exist_ok=True)
    with CURVE.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("coverage", "accuracy"), *(((i + 1) / n, a) for i, a in enumerate(accuracies))]
        )
    for coverage in COVERAGES:
        kept = round(coverage * n)
        interval = wilson(round(accuracies[kept - 1] * kept), kept)
        yield (
            f"RISK {accuracies[kept - 1]:.3f} accuracy at {coverage:.0%} coverage "
            f"({interval.low:.3f} to {interval.high:.3f}, {kept} rows)"
        )
    area, error = 1 - sum(accuracies) / n, 1 - accuracies[-1]
    yield f"RISK {area:.3f} AURC, {error:.3f} by chance; {CURVE} has the curve"


def curve(probabilities: Sequence[float], right: Sequence[bool]) -> list[float]:
    """Return the accuracy among the most probable 1, 2, ... rows; equally probable ones keep their order."""
    hits = 0
    found: list[float] = []
    for i in sorted(range(len(right)), key=lambda i: -probabilities[i]):
        hits += right[i]
        found.append(hits / (len(found) + 1))
    return found
