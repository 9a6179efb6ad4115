"""The built-in metrics, each in a file of its own that says its formula, range, direction and source."""

from __future__ import annotations

import importlib
from typing import Literal, get_args

from vllm_tasks.metrics.measure import Measure

BuiltinMetric = Literal[
    "exact_match",
    "numeric_match",
    "contains",
    "regex_match",
    "token_f1",
    "bleu",
    "chrf",
    "rouge",
    "edit_similarity",
    "json_valid",
    "json_fields",
    "accuracy",
    "macro_f1",
    "multiple_choice",
    "perplexity",
    "latency",
    "output_tokens",
    "judge",
]
BUILT_IN: tuple[str, ...] = get_args(BuiltinMetric)


def built_in(name: str) -> Measure:
    """The built-in metric `name`, one of `BUILT_IN`; its file is imported now."""
    measure = importlib.import_module(f"vllm_tasks.metrics.{name}").MEASURE
    assert isinstance(measure, Measure)
    return measure
