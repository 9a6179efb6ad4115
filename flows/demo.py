"""The main job on real input: a table of questions, a real model in vLLM, a table of answers.

Run by `make demo`. Needs no Prefect server: Prefect starts a temporary one.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before Prefect is imported: its temporary server reports to nobody, and says only what matters.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
from prefect import flow
from prefect.futures import as_completed

from flows.smollm2 import model_folder
from vllm_tasks import Completion, RowError, VllmModel, completions

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
ANSWERS = Path("out") / "demo_answers.parquet"
ROWS_PER_TASK = 50
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
def demo(questions: Path = QUESTIONS, answers: Path = ANSWERS) -> Path:
    """Answer the questions of a JSONL file and write them with their scores to a Parquet file."""
    rows = pa.json.read_json(questions).to_pylist()
    print(f"{len(rows)} questions from {questions}")
    started = time.monotonic()
    with demo_model() as model:
        print(f"vLLM is ready after {time.monotonic() - started:.1f} s")
        answered = answer(model, rows)
    answers.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(answered), answers)
    report(answered)
    print(f"\nAll answers: {answers.resolve()}")
    return answers


def answer(model: VllmModel, rows: Sequence[Row]) -> list[Row]:
    """Ask all groups of rows at once, and say how far they are as each one finishes."""
    groups = [rows[i : i + ROWS_PER_TASK] for i in range(0, len(rows), ROWS_PER_TASK)]
    started = time.monotonic()
    futures = completions.map(model, [[r["question"] for r in g] for g in groups], on_error="return")
    done = tokens = 0
    for future in as_completed(list(futures)):
        results = future.result()
        done += len(results)
        tokens += sum(r.completion_tokens or 0 for r in results if isinstance(r, Completion))
        seconds = time.monotonic() - started
        speed = f"{done / seconds:.1f} rows/s, {tokens / seconds:.0f} output tokens/s"
        print(f"  {done:3d} of {len(rows)} rows, {speed}")
    results = [r for future in futures for r in future.result()]
    return [record(row, result) for row, result in zip(rows, results, strict=True)]


def record(row: Row, result: Completion | RowError) -> Row:
    """One row of the answers table: either an output or an error."""
    if isinstance(result, RowError):
        return {**row, "output": None, "_error": f"{result.kind}: {result.message}", "right": False}
    return {
        **row,
        "output": result.text,
        "_error": None,
        "_finish_reason": result.choices[0].finish_reason,
        "_completion_tokens": result.completion_tokens,
        "right": is_right(result.text, row["accept"]),
    }


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer occurs as a whole word; short ones, such as symbols, in exact case."""
    return any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, 0 if len(word) <= 2 else re.IGNORECASE)
        for word in accepted
    )


def report(rows: Sequence[Row]) -> None:
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
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="Parquet file to write")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vllm_tasks").setLevel(logging.INFO)
    demo(options.questions, options.answers)


if __name__ == "__main__":
    main()
