"""The page of a validation as text, and the report in a notebook."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from vllm_tasks import Dataset, Metric, Validation, VllmAPI
from vllm_tasks.results import ValidationReport
from vllm_tasks.validation.pages import bar, full_bar, markdown_of
from vllm_tasks.validation.run import validate

HOSTILE = "<script>alert(1)</script> | ` \n# Head\n\x1b[31m\x00 ![x](http://evil) " + "x" * 100_000


def validated(
    server: ScriptedServer, lake: Any, right: int, wrong: str = "wrong", **other: Any
) -> ValidationReport:
    """A model that answers `right` of ten questions rightly."""

    def script(asked: Asked) -> Reply | None:
        if asked.body is None:
            return None
        number = int(asked.prompt[1:])
        reply = usual(asked)
        reply.body["choices"][0]["text"] = f"a{number}" if number < right else wrong
        return reply

    server.script = script
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    fields = {
        "datasets": [Dataset(identifier="ten", raw_data=rows)],
        "metrics": [Metric(identifier="exact_match")],
        "key": ("question", "answer"),
        "thresholds": {"exact_match": 0.7},
    }
    validation = Validation(**fields | other)
    with VllmAPI(identifier="m", api_url=server.url, model="x", chat=False, retries=0) as model:
        return validate(model, validation, db=str(lake))


@pytest.mark.parametrize(
    ("value", "top", "drawn"),
    [
        (0.0, 1.0, ""),
        (1.0, 1.0, "█" * 10),
        (0.5, 1.0, "█" * 5),
        (0.53, 1.0, "█" * 5 + "▎"),
        (7.0, 28.0, "█" * 2 + "▌"),
        (9.0, 1.0, "█" * 10),
        (-1.0, 1.0, ""),
        (math.nan, 1.0, ""),
        (math.inf, 1.0, ""),
    ],
)
def test_a_bar_has_the_length_of_its_value(value: float, top: float, drawn: str) -> None:
    """In steps of an eighth of a character; what has no length has no bar."""
    assert bar(value, top) == drawn


def test_a_full_bar_is_one_or_the_largest_value() -> None:
    """Fractions are drawn on the same scale on all pages."""
    assert full_bar([0.2, math.nan]) == 1.0
    assert full_bar([2.0, 40.0, math.inf]) == 40.0


def test_the_history_is_also_a_table(server: ScriptedServer, tmp_path: Any) -> None:
    """Prefect 3.7's new UI shows no picture within Markdown; runs are listed with bars, the newest first."""
    first = validated(server, tmp_path, 8)
    assert "## History" not in markdown_of("m", first.datasets[0])
    page = markdown_of("m", validated(server, tmp_path, 5).datasets[0])
    _, _, below = page.partition("## History of exact_match\n\n")
    lines = below.splitlines()[2:4]
    assert [line.split(" | ")[4:] for line in lines] == [
        ["█" * 5, "**failed** |"],
        ["█" * 8, "passed |"],
    ]
    assert re.match(r"\| \d{4}-\d\d-\d\d \d\d:\d\d \| `[0-9a-f]{4}` \| 0\.5 \|", lines[0])


def test_a_validation_draws_itself_in_a_notebook(server: ScriptedServer, tmp_path: Any) -> None:
    """Values, the history as a picture and the worst rows; printed, it is one line."""
    report = validated(server, tmp_path, 8)
    html = report._repr_html_()
    assert "m on ten passed" in html
    assert html.count("<table>") == 2
    assert "0.4422 to 0.9646 (approximate)" in html
    assert '<img src="data:image/svg+xml;base64,' in html
    assert "q8" in html
    assert "q1" not in html
    assert repr(report) == f"<ValidationReport of {report}>"
    assert "\n" not in str(report)
    failed = validated(server, tmp_path, 5)._repr_html_()
    assert "m on ten failed: ten: exact_match is 0.5" in failed


def test_rows_of_one_score_have_no_worst(server: ScriptedServer, tmp_path: Any) -> None:
    """Answers that all have five tokens are alike; answers that are all wrong are all shown as wrong."""
    counted = {"metrics": [Metric(identifier="exact_match"), Metric(identifier="output_tokens")]}
    report = validated(server, tmp_path, 0, **counted)
    assert {row.metric for row in report.datasets[0].worst} == {"exact_match"}


def test_no_answer_breaks_a_notebook_or_a_page(server: ScriptedServer, tmp_path: Any) -> None:
    """Markup, control characters and 100 kB in an answer are shortened text."""
    report = validated(server, tmp_path, 8, HOSTILE)
    html, page = report._repr_html_(), markdown_of("m", report.datasets[0])
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 2
    assert html.isprintable()
    lines = [line for line in page.splitlines() if "alert(1)" in line]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("  - answer: `")
        assert line.count("`") == 2
        assert len(line) < 300
