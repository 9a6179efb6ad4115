"""What runs of tasks leave: their names, attempts and answers."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.runtime import task_run

from tests.servers.scripted_server import answer_to
from vllm_tasks import predict, predict_batches
from vllm_tasks.tasks import completions

TASKS = pytest.mark.parametrize("the_task", [predict, predict_batches, completions])


class Runs:
    """A `prompt_func` that records the name and the attempt of its task run."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, x: Any) -> str:
        self.seen.append((task_run.name, task_run.run_count))
        return str(x)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]

    @property
    def attempts(self) -> int:
        return max(attempt for _, attempt in self.seen)


def answers(*prompts: str) -> list[str]:
    return [answer_to(p) for p in prompts]
