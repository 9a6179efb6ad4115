"""The report of a run over a table in a notebook, as HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_tasks.printable import html_table, html_text, one_line
from vllm_tasks.rows import cause_of
from vllm_tasks.tables.keys import display_key

Report = Any
"""A `vllm_tasks.tables.report.Report`, which imports this file."""

TEXT_LENGTH = 200
"""Characters of an answer or a message."""


def html_of(report: Report) -> str:
    """Return counts, errors by cause and sample answers as HTML; texts of rows and servers are escaped."""
    return "".join(_parts(report))


def _parts(report: Report) -> Iterator[str]:
    yield f"<p>{html_text(str(report))}</p>"
    if report.errors:
        yield html_table(
            ("cause", "rows", "for example", "keys"),
            (
                (
                    cause_of(error.kind),
                    f"{error.rows:,}",
                    one_line(report.example_of(error.kind), TEXT_LENGTH),
                    ", ".join(map(display_key, error.keys)),
                )
                for error in report.errors
            ),
        )
    if report.samples:
        yield "<p>Sample answers:</p>"
        answers = ((display_key(s.key), one_line(s.answer, TEXT_LENGTH)) for s in report.samples)
        yield html_table(("key", "answer"), answers)
