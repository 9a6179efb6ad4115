"""The built-in metrics. Each has its own file, which documents its formula, range, direction and source."""

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
    "brier",
    "expected_calibration_error",
    "log_loss",
    "pearson",
    "spearman",
    "recall_at_k",
    "ndcg_at_k",
    "multiple_choice",
    "perplexity",
    "latency",
    "output_tokens",
    "judge",
]
BUILT_IN: tuple[str, ...] = get_args(BuiltinMetric)


def built_in(name: str) -> Measure:
    """Import and return a built-in metric.

    Args:
        name: One of `BUILT_IN`.
    """
    measure = importlib.import_module(f"vllm_tasks.metrics.{name}").MEASURE
    assert isinstance(measure, Measure)
    return measure
