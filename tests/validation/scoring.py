"""Scores by the built-in metrics."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

from vllm_tasks.metrics import built_in

quick = settings(deadline=None, max_examples=40)


def score(name: str, *args: Any, **options: Any) -> Any:
    return built_in(name).score(*args, **options)
