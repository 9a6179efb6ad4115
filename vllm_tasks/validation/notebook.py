"""The report of a validation in a notebook, as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from vllm_tasks.printable import html_table, html_text
from vllm_tasks.validation.picture import data_uri, picture_of
from vllm_tasks.validation.texts import inputs_of, text_of

DatasetReport: TypeAlias = Any
ValidationReport: TypeAlias = Any
Value: TypeAlias = Any
Verdict: TypeAlias = Any
"""The types of `vllm_tasks.validation.report`, which imports this file."""


def html_of(report: ValidationReport) -> str:
    """Return values, history and worst rows of each data set as HTML; foreign texts are escaped."""
    return "".join(part for dataset in report.datasets for part in _parts(report.model, dataset))


def _parts(model: str, report: DatasetReport) -> Iterator[str]:
    verdict = "passed" if not report.reasons else "failed: " + "; ".join(report.reasons)
    yield f"<p>{html_text(f'{model} on {report.dataset} {verdict}')}</p>"
    lines = zip(report.values, report.verdicts, strict=True)
    yield html_table(("metric", "value", "95 % interval", "rows", "failed", "verdict"), map(_line, lines))
    # As an image: styles of an SVG in the page would apply to all of the page.
    yield f'<img src="{data_uri(picture_of(report))}" alt="">'
    if report.worst:
        yield "<p>Worst rows:</p>"
        yield html_table(
            ("row", "metric", "score", "input", "expected", "answer"),
            (
                (
                    str(row.row),
                    row.metric,
                    f"{row.score:.3g}",
                    inputs_of(row.inputs),
                    text_of(row.target),
                    text_of(row.answer),
                )
                for row in report.worst
            ),
        )


def _line(of: tuple[Value, Verdict]) -> tuple[str, ...]:
    value, verdict = of
    note = " (approximate)" if value.approximate else ""
    interval = f"{value.low:.4g} to {value.high:.4g}{note}"
    return (
        value.metric,
        f"{value.value:.4g}",
        interval,
        f"{value.n:,}",
        f"{value.failed:,}",
        "passed" if verdict.reason is None else "failed",
    )
