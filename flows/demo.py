"""The main job on real input: a table of questions, a real model in vLLM, a table of answers, and a score.

`make demo` runs it. It needs no Prefect server: Prefect starts a temporary one. Interrupt it and run it
again: it resumes where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before Prefect is imported: its temporary server sends no usage data and logs only warnings.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
# The server's first start on a new machine reads thousands of files; Prefect's default timeout is 20 seconds.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

import pyarrow.json
from prefect import flow
from pydantic import SecretStr

from flows.smollm2 import model_folder, number_type
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmModel, predict_in_db, validate
from vllm_tasks.results import DatasetReport, Report

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
LAKE = Path("out") / "lake"
PICTURE = Path("out") / "validation.svg"
EXAMPLES = 6

Row = dict[str, Any]


def demo_model() -> VllmModel:
    """Return SmolLM2 with a cache that is small enough for any machine.

    It is not compiled: on 2 CPU cores, compiling takes 50 s at every start and saves 2 s on these 300 rows.
    """
    return VllmModel(
        identifier="smollm2-135m",
        model_name=str(model_folder()),
        vllm_kwargs={
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 2**30,
            "enforce_eager": True,
            "dtype": number_type(),
        },
        system="Answer the question in one short sentence.",
        predict_kwargs={"temperature": 0, "max_tokens": 32},
    )


@flow(name="demo")
def demo(questions: Path = QUESTIONS, lake: Path = LAKE, overwrite: bool = False) -> Report:
    """Answer the questions of a JSONL file; questions and answers are tables in the folder `lake`."""
    lake.mkdir(parents=True, exist_ok=True)
    shutil.copy(questions, lake / "questions.jsonl")
    model = demo_model()
    print(f"Questions: {lake / 'questions.jsonl'}. Starting vLLM, if there are questions to process ...")
    report: Report = predict_in_db(
        model, "question", "questions", db=str(lake), max_chunk_size=100, overwrite=overwrite
    )
    print(report)
    show(with_answers(lake, model.identifier))
    if not report.processed:
        print("All questions had answers, so none was processed; --overwrite processes them again.")
    print(f"\nAll answers: {Path(report.outputs).resolve()} (a Delta table)")
    # The weights are in a folder, so they are known to be unchanged: answers of an earlier run can be reused.
    validated = validate(model, demo_validation(), db=str(lake), reuse=not overwrite)
    show_score(validated.datasets[0])
    return report


def demo_validation() -> Validation:
    """Return a validation on a sample of the questions, with an own and a built-in metric, and a limit."""
    return Validation(
        datasets=[Dataset(identifier="sample", select="questions", sample_size=100)],
        metrics=[Metric(identifier="right", object=is_right), Metric(identifier="output_tokens")],
        key=("question", "accept"),
        thresholds={"right": 0.3},
    )


def with_answers(lake: Path, predict_id: str) -> list[Row]:
    """Return the questions, each with its answer."""
    rows = pyarrow.json.read_json(lake / "questions.jsonl").to_pylist()
    outputs = {row["id"]: row for row in Datalayer(url=SecretStr(str(lake))).outputs(predict_id).to_pylist()}
    return [{**row, **outputs[row["id"]]} for row in rows]


def is_right(prediction: str, target: Sequence[str]) -> bool:
    """Return whether an accepted answer occurs as a word; the case of short ones, such as symbols, counts."""
    return any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prediction, 0 if len(word) <= 2 else re.IGNORECASE)
        for word in target
    )


def show(rows: Sequence[Row]) -> None:
    """Print a few answers, and the number of right ones by topic; a failed row counts as wrong."""
    right = {row["id"]: is_right(row["output"] or "", row["accept"]) for row in rows}
    print("\nSome answers:")
    for row in rows[:: -(-len(rows) // EXAMPLES)]:
        label = "right" if right[row["id"]] else "wrong"
        print(f"  [{label}] {row['question']} -> {' '.join((row['output'] or row['_error'] or '').split())}")
    print("\nRight answers by topic:")
    for topic in sorted({row["topic"] for row in rows}):
        scores = [right[row["id"]] for row in rows if row["topic"] == topic]
        print(f"  {topic:22s} {sum(scores):3d} of {len(scores)}")
    print(f"  {'all':22s} {sum(right.values()):3d} of {len(rows)} = {sum(right.values()) / len(rows):.1%}")


def show_score(report: DatasetReport) -> None:
    """Print the values of the validation, and draw them."""
    from vllm_tasks.validation.picture import picture_of

    print(f"\nValidated on a sample of {report.rows} questions, {report.processed} of them processed now:")
    for value in report.values:
        print(f"  {value.metric} {value.value:.4g}, 95 % interval {value.low:.4g} to {value.high:.4g}")
    print(f"  {report.failed} rows failed, {report.truncated} answers were truncated at max_tokens")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture_of(report))
    print(f"  picture: {PICTURE.resolve()}; history: {LAKE / '_metric_values'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSONL: question, topic, accept")
    parser.add_argument("--lake", type=Path, default=LAKE, help="folder of the tables")
    parser.add_argument("--overwrite", action="store_true", help="process all questions again")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vllm_tasks").setLevel(logging.INFO)
    demo(options.questions, options.lake, options.overwrite)


if __name__ == "__main__":
    main()
