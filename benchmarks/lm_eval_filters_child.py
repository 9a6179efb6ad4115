"""Scores of answers by lm-evaluation-harness's own filters and metric, in its own interpreter.

It reads a JSON list of kinds, `{"filters", "metric", "docs", "targets", "answers"}`, and writes the scores of
each: `answers` has the list of answers to each row, `targets` the list of accepted ones.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from lm_eval.api.metrics import exact_match_fn  # type: ignore[import-not-found]
from lm_eval.filters import build_filter_ensemble  # type: ignore[import-not-found]


def scores(kind: dict[str, Any]) -> list[float]:
    steps = [[step.pop("function"), step] for step in kind["filters"]]
    ensemble = build_filter_ensemble("ours", steps)
    rows = [
        SimpleNamespace(resps=answers, doc=doc, filtered_resps={})
        for answers, doc in zip(kind["answers"], kind["docs"], strict=True)
    ]
    ensemble.apply(rows)
    found = []
    for row, targets in zip(rows, kind["targets"], strict=True):
        said = row.filtered_resps["ours"]
        said = said[0] if isinstance(said, list) else said
        each = [
            exact_match_fn(predictions=[said], references=[target], **kind["metric"])["exact_match"]
            for target in targets
        ]
        found.append(float(max(each)))
    return found


if __name__ == "__main__":
    print(json.dumps([scores(kind) for kind in json.load(sys.stdin)]))
