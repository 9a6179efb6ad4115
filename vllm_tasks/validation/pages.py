"""Artifacts of a validation in Prefect's UI: a table of values, and a page with a picture of the history."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vllm_tasks.artifacts import (
    code,
    listed,
    markdown_table,
    show_page,
    show_table,
    slug,
    validation_key,
    warn_if_not_displayed,
    words,
)
from vllm_tasks.metrics.measure import Confusion, Reliability
from vllm_tasks.printable import one_line
from vllm_tasks.validation.axis import drawable
from vllm_tasks.validation.history import began
from vllm_tasks.validation.picture import Row, compare_svg, markdown_image, picture_of
from vllm_tasks.validation.report import (
    ChangedRow,
    Comparison,
    DatasetReport,
    Record,
    Standing,
    ValidationReport,
    Value,
    Verdict,
    WorstRow,
)
from vllm_tasks.validation.statistics import Paired
from vllm_tasks.validation.texts import inputs_of, text_of

RUNS_LISTED = 10
"""Runs in the table of a metric's history."""
BAR_WIDTH = 10
"""Characters of a full bar."""
BLOCKS: Sequence[str] = ["", *"▏▎▍▌▋▊▉"]
"""Unicode's blocks of 0 to 7 eighths of a character."""
CLASSES_SHOWN = 16
"""Classes in a confusion table: the largest ones, in the order of their labels."""
LABEL_SHOWN = 24
"""Characters of a label in a confusion table."""
HEAD_WIDTH = 80
"""Characters that fit into the head of a confusion table; classes with longer labels have numbers there."""


def show(report: ValidationReport) -> None:
    """Create `<model>-<dataset>-metrics` and `<model>-<dataset>-validation`, artifacts of each data set."""
    for dataset in report.datasets:
        name = slug(report.model, dataset.dataset)
        passed = "passed" if not dataset.reasons else "failed: " + "; ".join(dataset.reasons)
        with warn_if_not_displayed("the validation"):
            show_table(table_of(dataset), f"{name}-metrics", f"{report.model} {passed}")
            page = validation_key(report.model, dataset.dataset)
            show_page(markdown_of(report.model, dataset), page, passed)


def show_comparison(comparison: Comparison) -> None:
    """Create the artifact `comparison-<models>`, with a table and a picture for each data set and metric."""
    name = slug("comparison", *comparison.models)
    with warn_if_not_displayed("the comparison"):
        show_page(markdown_of_comparison(comparison), name, str(comparison)[:500])


def markdown_of_comparison(comparison: Comparison) -> str:
    """The page of a comparison: the models for each data set and metric, with differences from the first."""
    parts = [f"# {', '.join(map(words, comparison.models))}"]
    for dataset, metric in dict.fromkeys((s.dataset, s.metric) for s in comparison.standings):
        found = [s for s in comparison.standings if (s.dataset, s.metric) == (dataset, metric)]
        better = found[0].value.higher_is_better
        top = full_bar(s.value.value for s in found)
        title = f"{metric} on {dataset}"
        rows = [Row(s.model, s.value.value, s.value.low, s.value.high, s.passed) for s in found]
        head = (
            "model",
            "value",
            "95 % interval",
            "",
            "rows",
            "failed",
            "truncated",
            f"against {comparison.models[0]}",
        )
        parts += [
            f"## {words(title)} ({'more' if better else 'less'} is better)",
            markdown_table(list(map(words, head)), [_standing(s, top) for s in found]),
            markdown_image(compare_svg(rows, title=title, higher_is_better=better)),
        ]
    return "\n\n".join(parts) + "\n"


def _standing(standing: Standing, top: float) -> list[str]:
    value = standing.value
    return [
        words(standing.model),
        f"**{value.value:.4g}**",
        f"{value.low:.4g} to {value.high:.4g}",
        bar(value.value, top),
        f"{value.n:,}",
        f"{value.failed:,}",
        f"{value.truncated:,}",
        "" if standing.paired is None else _difference(standing.paired),
    ]


def _difference(paired: Paired) -> str:
    if math.isnan(paired.low):
        return f"{paired.difference:+.3g}"
    return f"{paired.difference:+.3g} ({paired.low:+.3g} to {paired.high:+.3g}, p={paired.p_different:.2g})"


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
            "verdict": "passed" if verdict.reason is None else "failed",
        }
        for value, verdict in zip(report.values, report.verdicts, strict=True)
    ]


def markdown_of(model: str, report: DatasetReport) -> str:
    """The page of a data set: verdict, values, history, rows that changed, worst rows, confusion, tables."""
    return "\n\n".join(_parts(model, report)) + "\n"


def _parts(model: str, report: DatasetReport) -> Iterator[str]:
    yield f"# {words(model)} on {words(report.dataset)}"
    yield "**Passed.**" if not report.reasons else "**Failed.** " + "; ".join(map(words, report.reasons))
    pairs = list(zip(report.values, report.verdicts, strict=True))
    head = ("metric", "value", "95 % interval", "limits", "rows", "against the last passed run")
    yield markdown_table(head, [_line(value, verdict, report.failed) for value, verdict in pairs])
    notes = [
        f"{words(value.metric)}: approximate interval, {words(value.approximate)}"
        for value in report.values
        if value.approximate
    ]
    for verdict in report.verdicts:
        further = [one for one in verdict.against if one.kind != "last"]
        notes += [
            f"{words(verdict.metric)} against the {one.kind} run: {_difference(one.paired)}"
            for one in further
        ]
        if verdict.untested:
            notes.append(f"{words(verdict.metric)}: **limit not tested**, {words(verdict.untested)}")
    notes += [
        f"{words(verdict.metric)}: {words(verdict.power)}" for verdict in report.verdicts if verdict.power
    ]
    if notes:
        yield "\n".join(f"- {note}." for note in notes)
    yield _counts(report)
    if report.resumed_at is not None:
        yield (
            f"**Resumed** at {report.resumed_at:%Y-%m-%d %H:%M:%S} UTC; the run began at "
            f"{began(report.answers):%Y-%m-%d %H:%M:%S} UTC. Answers from before are part of it; "
            "`resume=False` processes all rows anew."
        )
    yield markdown_image(picture_of(report))
    for value in report.values:
        runs = [record for record in report.history if record.metric == value.metric][-RUNS_LISTED:]
        if len(runs) > 1:
            yield f"## History of {words(value.metric)}"
            yield _history(runs)
    for value in report.values:
        changed = [row for row in report.changed if row.metric == value.metric]
        for what, rows in (
            ("regressed", [row for row in changed if not row.improved]),
            ("improved", [row for row in changed if row.improved]),
        ):
            if rows:
                yield f"## Most {what} rows in {words(value.metric)}"
                yield "\n".join(map(_changed, rows))
        if worst := [row for row in report.worst if row.metric == value.metric]:
            yield f"## Worst rows in {words(value.metric)}"
            yield "\n".join(map(_worst, worst))
    for metric, table in report.tables.items():
        if isinstance(table, Confusion):
            yield f"## Confusion in {words(metric)}"
            yield _confusion(table)
        else:
            yield f"## Reliability in {words(metric)}"
            yield _reliability(table)
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
    of = max((value.clusters or report.rows for value in report.values), default=report.rows)
    most = max((value.n for value in report.values), default=report.rows)
    rows = f"{report.rows:,} rows"
    if of < most:
        rows += f" in {of:,} clusters (equal inputs, or an equal value in the cluster column)"
    return f"{rows}; {failed}; {truncated}."


def _line(value: Value, verdict: Verdict, failed: int) -> list[str]:
    """The cells of a metric. More of them would end beyond a window of 1,400 pixels, so the number of
    `failed` rows, other baselines and whether a limit was tested stand below, where lines wrap."""
    change = "no run to compare with" if verdict.paired is None else _difference(verdict.paired)
    limits = []
    if verdict.threshold is not None:
        limits.append(f"{'≥' if value.higher_is_better else '≤'} {verdict.threshold:g}")
    if verdict.max_regression is not None:
        limits.append(f"≤ {verdict.max_regression:g} worse")
    arrow = "↑" if value.higher_is_better else "↓"
    return [
        f"{words(value.metric)} {arrow}",
        f"**{value.value:.4g}**",
        f"{value.low:.4g} to {value.high:.4g}" + (" (approximate)" if value.approximate else ""),
        ", ".join(limits) or "none",
        f"{value.n:,}" + (f" ({value.failed:,} failed)" if value.failed != failed else ""),
        change,
    ]


def _history(runs: Sequence[Record]) -> str:
    """The last runs with bars of text, which also show where Markdown has no pictures, as in the new UI of
    Prefect 3.7."""
    top = full_bar(run.value for run in runs)
    lines = [
        (
            f"{run.created_at:%Y-%m-%d %H:%M}",
            code(run.dataset_hash[:4]),
            f"{run.value:.4g}",
            f"{run.low:.4g} to {run.high:.4g}",
            bar(run.value, top),
            "passed" if run.reason is None else "**failed**",
        )
        for run in reversed(runs)
    ]
    return markdown_table(("run (UTC)", "rows", "value", "95 % interval", "", "gate"), lines)


def full_bar(values: Iterable[float]) -> float:
    """Return the value of a full bar: 1, as most metrics are fractions, or a larger value."""
    return max([1.0, *filter(drawable, values)])


def bar(value: float, top: float) -> str:
    """Return a bar of text, of full width for `top`; empty for a value below 0 and for none."""
    if not drawable(value) or value <= 0:
        return ""
    eighths: int = round(8 * BAR_WIDTH * min(value / top, 1.0))
    return "█" * (eighths // 8) + BLOCKS[eighths % 8]


def _changed(row: ChangedRow) -> str:
    return listed(
        f"row {row.row}, score {row.before:.3g} → {row.after:.3g}",
        {
            "input": inputs_of(row.inputs),
            "expected": text_of(row.target),
            "answer before": text_of(row.answer_before),
            "answer now": text_of(row.answer_after),
        },
    )


def _worst(row: WorstRow) -> str:
    texts = {"input": inputs_of(row.inputs), "expected": text_of(row.target), "answer": text_of(row.answer)}
    return listed(f"row {row.row}, score {row.score:.3g}", texts)


def _confusion(table: Confusion) -> str:
    counts = np.array(table.counts)
    largest = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")[:CLASSES_SHOWN]
    kept = sorted(largest.tolist())
    labels = [code(one_line(text_of(table.labels[i]), LABEL_SHOWN)) for i in kept]
    heads = labels
    if sum(map(len, labels)) > HEAD_WIDTH:
        heads = [f"{number}" for number in range(1, len(labels) + 1)]
        labels = [f"{number}: {label}" for number, label in zip(heads, labels, strict=True)]
    rows = [
        [label, *(f"{count:,}" if count else "·" for count in counts[i, kept].tolist())]
        for i, label in zip(kept, labels, strict=True)
    ]
    more = f"\n\n({len(table.labels) - len(kept)} more classes)" if len(table.labels) > len(kept) else ""
    return markdown_table(("expected \\ predicted", *heads), rows) + more


def _reliability(table: Reliability) -> str:
    """The bins with bars of text: where labels are as often right as they are probable, a bin's two bars are
    equally long."""
    rows = [
        (
            f"{bin_.low:.2g} to {bin_.high:.2g}",
            f"{bin_.rows:,}",
            f"{bin_.probability:.3f}",
            bar(bin_.probability, 1.0),
            f"{bin_.right:.3f}",
            bar(bin_.right, 1.0),
        )
        for bin_ in table.bins
    ]
    return markdown_table(("probability of the label", "rows", "mean", "", "right", ""), rows)
