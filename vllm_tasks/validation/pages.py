"""Artifacts of a validation in Prefect's UI: a table of values, and a page with a picture of the history."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from vllm_tasks.artifacts import code, markdown_table, slug, warn_if_not_displayed, words
from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.metrics.measure import Confusion
from vllm_tasks.validation.picture import Panel, Point, Row, compare_svg, histories_svg, markdown_image
from vllm_tasks.validation.report import (
    ChangedRow,
    Comparison,
    DatasetReport,
    Standing,
    ValidationReport,
    Value,
    Verdict,
    WorstRow,
)
from vllm_tasks.validation.statistics import Paired

RUNS_SHOWN = 60
"""Runs in the picture. Under each date are the first digits of the rows' hash, which show if rows changed."""
CLASSES_SHOWN = 20
"""Classes in a confusion table: the largest ones, in the order of their labels."""
WORST = "row", "score", "input", "expected", "answer"
CHANGED = "row", "score", "input", "expected", "answer before", "answer now"
TEXT_SHOWN = 200
"""Characters of an input, an answer or a target in a table."""


def show(report: ValidationReport) -> None:
    """Create `<model>-<dataset>-metrics` and `<model>-<dataset>-validation`, artifacts of each data set."""
    for dataset in report.datasets:
        name = slug(f"{report.model}-{dataset.dataset}")
        passed = "passed" if not dataset.reasons else "failed: " + "; ".join(dataset.reasons)
        with warn_if_not_displayed("the validation"):
            create_table_artifact(table_of(dataset), f"{name}-metrics", f"{report.model} {passed}")
            create_markdown_artifact(markdown_of(report.model, dataset), f"{name}-validation", passed)


def show_comparison(comparison: Comparison) -> None:
    """Create the artifact `comparison-<models>`, with a table and a picture for each data set and metric."""
    name = slug(f"comparison-{'-'.join(comparison.models)}")[:200].strip("-")
    with warn_if_not_displayed("the comparison"):
        create_markdown_artifact(markdown_of_comparison(comparison), name, str(comparison)[:500])


def markdown_of_comparison(comparison: Comparison) -> str:
    """The page of a comparison: the models for each data set and metric, with differences from the first."""
    parts = [f"# {', '.join(map(words, comparison.models))}"]
    for dataset, metric in dict.fromkeys((s.dataset, s.metric) for s in comparison.standings):
        found = [s for s in comparison.standings if (s.dataset, s.metric) == (dataset, metric)]
        better = found[0].value.higher_is_better
        title = f"{metric} on {dataset}"
        rows = [Row(s.model, s.value.value, s.value.low, s.value.high, s.passed) for s in found]
        head = (
            "model",
            "value",
            "95 % interval",
            "rows",
            "failed",
            "truncated",
            f"against {comparison.models[0]}",
        )
        parts += [
            f"## {words(title)} ({'more' if better else 'less'} is better)",
            markdown_table(list(map(words, head)), map(_standing, found)),
            markdown_image(compare_svg(rows, title=title, higher_is_better=better), title),
        ]
    return "\n\n".join(parts) + "\n"


def _standing(standing: Standing) -> list[str]:
    value = standing.value
    return [
        words(standing.model),
        f"**{value.value:.4g}**",
        f"{value.low:.4g} to {value.high:.4g}",
        f"{value.n:,}",
        f"{value.failed:,}",
        f"{value.truncated:,}",
        "" if standing.paired is None else _difference(standing.paired),
    ]


def _difference(paired: Paired) -> str:
    return f"{paired.difference:+.4g} ({paired.low:+.4g} to {paired.high:+.4g}, p={paired.p_different:.2g})"


def table_of(report: DatasetReport) -> list[dict[str, Any]]:
    """The table of values, one row for each metric."""
    return [
        {
            "metric": value.metric,
            "value": round(value.value, 6),
            "95 % from": round(value.low, 6) if math.isfinite(value.low) else "unknown",
            "to": round(value.high, 6) if math.isfinite(value.high) else "unknown",
            "rows": value.n,
            "failed": value.failed,
            "truncated": value.truncated,
            "change": "" if verdict.paired is None else round(verdict.paired.difference, 6),
            "verdict": verdict.reason or "passed",
        }
        for value, verdict in zip(report.values, report.verdicts, strict=True)
    ]


def markdown_of(model: str, report: DatasetReport) -> str:
    """The page of a data set: verdict, values, history, rows that changed, worst rows, confusion, tables."""
    return "\n\n".join(_parts(model, report)) + "\n"


def _parts(model: str, report: DatasetReport) -> Iterator[str]:
    yield f"# {words(model)} on {words(report.dataset)}"
    yield "**Passed.**" if not report.reasons else "**Failed.** " + "; ".join(map(words, report.reasons))
    head = "metric", "value", "95 % interval", "rows", "against the last passed run", "limits"
    pairs = list(zip(report.values, report.verdicts, strict=True))
    yield markdown_table(head, [_line(value, verdict) for value, verdict in pairs])
    yield _counts(report)
    yield markdown_image(picture_of(report), ", ".join(f"{value.metric} {value}" for value in report.values))
    for value in report.values:
        changed = [row for row in report.changed if row.metric == value.metric]
        for what, rows in (
            ("regressed", [row for row in changed if not row.improved]),
            ("improved", [row for row in changed if row.improved]),
        ):
            if rows:
                yield f"## Most {what} rows in {words(value.metric)}"
                yield markdown_table(CHANGED, map(_changed, rows))
        if worst := [row for row in report.worst if row.metric == value.metric]:
            yield f"## Worst rows in {words(value.metric)}"
            yield markdown_table(WORST, map(_worst, worst))
    for metric, table in report.tables.items():
        yield f"## Confusion in {words(metric)}"
        yield _confusion(table)
    answers = f"{code(report.outputs)}, where `run` is {code(report.answers)}"
    yield f"Run {code(report.run)}. Its answers are in {answers}; its scores by row are in `_metric_scores`."


def _counts(report: DatasetReport) -> str:
    failed = f"**{report.failed:,} failed**" if report.failed else "no row failed"
    if report.failed and {value.on_error for value in report.values} == {"miss"}:
        failed += " (counted as misses; left out of metrics that have no worst value)"
    elif report.failed:
        failed += " (left out)"
    truncated = (
        f"**{report.truncated:,} answers were truncated** at max_tokens"
        if report.truncated
        else "no answer was truncated"
    )
    return f"{report.rows:,} rows; {failed}; {truncated}."


def _line(value: Value, verdict: Verdict) -> list[str]:
    change = "no run to compare with" if verdict.paired is None else _difference(verdict.paired)
    limits = []
    if verdict.threshold is not None:
        limits.append(f"{'at least' if value.higher_is_better else 'at most'} {verdict.threshold:g}")
    if verdict.max_regression is not None:
        untested = " (**not tested**: no run over these rows to compare with)" if verdict.untested else ""
        limits.append(f"at most {verdict.max_regression:g} worse{untested}")
    arrow = "more is better" if value.higher_is_better else "less is better"
    return [
        f"{words(value.metric)} ({arrow})",
        f"**{value.value:.4g}**",
        f"{value.low:.4g} to {value.high:.4g}",
        f"{value.n:,}" + (f" ({value.failed:,} failed)" if value.failed else ""),
        change,
        ", ".join(limits) or "none",
    ]


def picture_of(report: DatasetReport) -> str:
    """An SVG of the last runs over a data set of this name; each metric has its own axis."""
    panels = []
    for value, verdict in zip(report.values, report.verdicts, strict=True):
        runs = [record for record in report.history if record.metric == value.metric][-RUNS_SHOWN:]
        points = [
            Point(r.created_at, r.value, r.low, r.high, r.dataset_hash[:4], r.reason is None) for r in runs
        ]
        panels.append(Panel(value.metric, points, verdict.threshold, value.higher_is_better))
    return histories_svg(panels)


def _changed(row: ChangedRow) -> list[str]:
    texts = _input(row.inputs), row.target, row.answer_before, row.answer_after
    return [str(row.row), f"{row.before:.3g} → {row.after:.3g}", *(code(_text(text)) for text in texts)]


def _worst(row: WorstRow) -> list[str]:
    texts = _input(row.inputs), row.target, row.answer
    return [str(row.row), f"{row.score:.3g}", *(code(_text(text)) for text in texts)]


def _input(inputs: Any) -> Any:
    return inputs[0] if len(inputs) == 1 else inputs


def _text(value: Any) -> str:
    text = " ".join(_readable(value).split())
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"


def _readable(value: Any) -> str:
    """A scalar as in a prompt, data as JSON, and anything else as its `repr`."""
    try:
        if value is None or isinstance(value, bool | list | dict):
            return json.dumps(value, ensure_ascii=False, default=_readable)
        return plain_text(value)
    except (TypeError, ValueError):
        return repr(value)


def _confusion(table: Confusion) -> str:
    counts = np.array(table.counts)
    largest = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")[:CLASSES_SHOWN]
    kept = sorted(largest.tolist())
    shown = [table.labels[i] for i in kept]
    rows = [
        [code(_text(label)), *(f"{count:,}" if count else "·" for count in counts[i, kept].tolist())]
        for i, label in zip(kept, shown, strict=True)
    ]
    more = f"\n\n({len(table.labels) - len(shown)} more classes)" if len(table.labels) > len(shown) else ""
    return markdown_table(("expected \\ predicted", *(code(_text(label)) for label in shown)), rows) + more
