"""The main job on real input: a table of questions, a real model in vLLM, a table of answers.

Run by `make demo`. Needs no Prefect server: Prefect starts a temporary one. Interrupt it and run it again:
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before Prefect is imported: its temporary server reports to nobody, and says only what matters.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import pyarrow.json
from prefect import flow
from pydantic import SecretStr

from flows.smollm2 import model_folder
from vllm_tasks import Datalayer, Report, VllmModel, predict_in_db

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
LAKE = Path("out") / "lake"
SAMPLE = 6

Row = dict[str, Any]


def demo_model() -> VllmModel:
    """SmolLM2 with a cache small enough for any machine.

    Uncompiled: on 2 CPU cores compiling takes 50 s at every start, and saves 2 s of these 300 rows.
    """
    return VllmModel(
        identifier="smollm2-135m",
        model_name=str(model_folder()),
        vllm_kwargs={"max_model_len": 1024, "kv_cache_memory_bytes": 2**30, "enforce_eager": True},
        chat=True,
        system="Answer the question in one short sentence.",
        predict_kwargs={"temperature": 0, "max_tokens": 32},
    )


@flow(name="demo")
def demo(questions: Path = QUESTIONS, lake: Path = LAKE, overwrite: bool = False) -> Report:
    """Answer the questions of a JSONL file; questions and answers are tables in the folder `lake`."""
    lake.mkdir(parents=True, exist_ok=True)
    shutil.copy(questions, lake / "questions.jsonl")
    model = demo_model()
    print(f"Questions: {lake / 'questions.jsonl'}. Starting vLLM, if there is anything to ask ...")
    report: Report = predict_in_db(
        model, "question", "questions", db=str(lake), max_chunk_size=100, overwrite=overwrite
    )
    print(report)
    show(scored(lake, model.identifier))
    if not report.asked:
        print("All questions were answered before, so none was asked; --overwrite asks them again.")
    print(f"\nAll answers: {Path(report.outputs).resolve()} (a Delta table)")
    return report


def scored(lake: Path, predict_id: str) -> list[Row]:
    """Questions and answers together, with a mark."""
    rows = pyarrow.json.read_json(lake / "questions.jsonl").to_pylist()
    outputs = {row["id"]: row for row in Datalayer(url=SecretStr(str(lake))).outputs(predict_id).to_pylist()}
    return [
        {**row, **outputs[row["id"]], "right": is_right(outputs[row["id"]]["output"] or "", row["accept"])}
        for row in rows
    ]


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer occurs as a whole word; short ones, such as symbols, in exact case."""
    return any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, 0 if len(word) <= 2 else re.IGNORECASE)
        for word in accepted
    )


def show(rows: Sequence[Row]) -> None:
    """Print a sample of the answers and the score; a failed row counts as wrong."""
    print("\nA sample:")
    for row in rows[:: math.ceil(len(rows) / SAMPLE)]:
        mark = "right" if row["right"] else "wrong"
        print(f"  [{mark}] {row['question']} -> {' '.join((row['output'] or row['_error']).split())}")
    print("\nRight answers by topic:")
    for topic in sorted({row["topic"] for row in rows}):
        marks = [row["right"] for row in rows if row["topic"] == topic]
        print(f"  {topic:22s} {sum(marks):3d} of {len(marks)}")
    right, failed = sum(row["right"] for row in rows), sum(row["_error"] is not None for row in rows)
    low, high = wilson(right, len(rows))
    print(
        f"\nScore: {right} of {len(rows)} right = {right / len(rows):.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}); {failed} rows failed"
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), as two shares of 1."""
    p, spread = hits / n, z**2 / n
    center, half = p + spread / 2, z * math.sqrt(p * (1 - p) / n + spread / n / 4)
    return (center - half) / (1 + spread), (center + half) / (1 + spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSONL: question, topic, accept")
    parser.add_argument("--lake", type=Path, default=LAKE, help="folder of the tables")
    parser.add_argument("--overwrite", action="store_true", help="ask all questions again")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vllm_tasks").setLevel(logging.INFO)
    demo(options.questions, options.lake, options.overwrite)


if __name__ == "__main__":
    main()
