"""lm-evaluation-harness in its own interpreter: it reads one JSON line for each run and writes one outcome.

`benchmarks.harness` starts it with a folder of task files, as `python -P lm_eval_child.py FOLDER`. It prints
`ready` after its imports, and ends when its input ends.
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
    os.dup2(2, 1)  # its own output goes to the log
    # The index of the tasks that it is installed with would take another 6 s.
    tasks = TaskManager(include_path=folder, include_defaults=False)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        found = likelihoods(tasks, **order) if order["metric"] is None else run(tasks, **order)
        print(json.dumps(found), file=answers, flush=True)


def run(tasks: Any, task: str, metric: str, model_args: dict[str, Any]) -> dict[str, Any]:
    """The seconds, the value of each filter, and the rows of each filter: answer and score."""
    started = time.perf_counter()
    found = simple_evaluate("local-completions", model_args=model_args, tasks=[task], task_manager=tasks)
    seconds = time.perf_counter() - started
    rows: dict[str, list[tuple[str, float]]] = {}
    for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"]):
        (answer,) = sample["resps"][0]
        rows.setdefault(sample["filter"], []).append((answer, float(sample[metric])))
    values = {name: float(found["results"][task][f"{metric},{name}"]) for name in rows}
    return {"seconds": seconds, "values": values, "rows": rows}


def likelihoods(tasks: Any, task: str, metric: None, model_args: dict[str, Any]) -> list[list[float]]:
    """The log probabilities of each row: of its choices, or of the document."""
    found = simple_evaluate("local-completions", model_args=model_args, tasks=[task], task_manager=tasks)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[_logprob(*answers) for answers in sample["resps"]] for sample in samples]


def _logprob(answer: Any) -> float:
    """A log probability; of a choice it stands in a pair with whether decoding would be greedy."""
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


if __name__ == "__main__":
    main(sys.argv[1])
