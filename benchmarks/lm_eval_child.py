"""lm-evaluation-harness in its own interpreter: one JSON line in for each run, one out for its outcome.

Started by `benchmarks.harness`, with a folder of task files, as `python -P lm_eval_child.py FOLDER`. Says
when it is ready, which is after its imports, and ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from lm_eval import simple_evaluate  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]


def main(folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what it prints itself goes to the log
    # Without the tasks that come with it, whose index would take it another 6 s.
    tasks = TaskManager(include_path=folder, include_defaults=False)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(tasks, **json.loads(line))), file=answers, flush=True)


def run(tasks: Any, task: str, metric: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """How long it took, the value by filter, and by filter of each row: answer, extracted, score."""
    started = time.perf_counter()
    found = simple_evaluate("local-completions", model_args=model_args, tasks=[task], task_manager=tasks)
    seconds = time.perf_counter() - started
    rows: dict[str, list[tuple[str, str, float]]] = {}
    for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
        (answer,), extracted = sample["resps"][0], sample["filtered_resps"][0]
        rows.setdefault(sample["filter"], []).append((answer, extracted, float(sample[metric])))
    values = {name: float(found["results"][task][f"{metric},{name}"]) for name in rows}
    return {"seconds": seconds, "values": values, "rows": rows}


if __name__ == "__main__":
    main(sys.argv[1])
