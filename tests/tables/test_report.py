"""The report of a run over a table, as people read it: printed, on its page, in a notebook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused, usual
from vllm_tasks import VllmAPI
from vllm_tasks.artifacts import markdown_of
from vllm_tasks.results import Report, Sample
from vllm_tasks.rows import CAUSES, RowErrorKind
from vllm_tasks.tables import predict_in_db

TOO_LONG = "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens."
HOSTILE = "<script>alert(1)</script> | ` \n# Head\n\x1b[31m\x00 ![x](http://evil) " + "x" * 100_000


@pytest.fixture
def lake(tmp_path: Path) -> str:
    (tmp_path / "rows.csv").write_text("id,text\n" + "".join(f"{i},t{i}\n" for i in range(10)))
    return str(tmp_path)


def answered(words: str) -> Any:
    """A script that answers with `words`, and refuses two prompts as too long."""

    def script(asked: Asked) -> Reply | None:
        if asked.body is None:
            return None
        if asked.prompt in ("t3", "t4"):
            return refused(400, TOO_LONG)
        reply = usual(asked)
        reply.body["choices"][0]["text"] = words
        return reply

    return script


def run(server: ScriptedServer, lake: str, words: str = "fine") -> Report:
    server.script = answered(words)
    with VllmAPI(identifier="m", api_url=server.url, model="x", chat=False, retries=0) as model:
        return predict_in_db(model, "text", "rows", db=lake, max_failed=None)


def test_every_kind_of_error_has_its_cause() -> None:
    """The words of pages are complete."""
    assert list(CAUSES) == list(get_args(RowErrorKind))


def test_the_page_begins_with_the_causes_of_errors(server: ScriptedServer, lake: str) -> None:
    """First why rows failed, in words and without the address of the server; then answers, then counts."""
    page = markdown_of(run(server, lake))
    title, errors, first, example, keys, samples, *_ = [line for line in page.splitlines() if line]
    assert (title, errors, samples) == ("# m", "## Errors", "## Sample answers")
    assert first == "- **2 rows: the prompt does not fit into the model's context (too_long)**"
    assert example.startswith("  - for example: `\"This model's maximum context length is 2048")
    assert keys == "  - keys: `3, 4`"
    assert "HTTP" not in page
    assert page.index("## Sample answers") < page.index("## Counts")
    assert page.count("  - answer: `fine`") == 3


def test_a_site_may_show_no_answers(
    server: ScriptedServer, lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With VLLM_TASKS_REPORT_SAMPLES=0 the report has none."""
    monkeypatch.setenv("VLLM_TASKS_REPORT_SAMPLES", "0")
    report = run(server, lake, "private")
    assert report.samples == ()
    assert "private" not in markdown_of(report) + report._repr_html_()


def test_a_report_draws_itself_in_a_notebook(server: ScriptedServer, lake: str) -> None:
    """One line and two tables; the printed forms are one line."""
    report = run(server, lake)
    html = report._repr_html_()
    assert html.count("<table>") == 2
    assert "does not fit into the model&#x27;s context (too_long)" in html
    assert "m: 8 rows succeeded, 2 failed" in html
    assert repr(report) == f"<Report of {report}>"
    assert "\n" not in str(report)


def test_no_answer_breaks_a_page(server: ScriptedServer, lake: str) -> None:
    """Markup, bars, control characters and 100 kB in an answer stay in their cell, shortened."""
    report = run(server, lake, HOSTILE)
    report = replace(report, samples=(*report.samples, Sample(("\ud800",), "\ud800 <b>")))
    page, html = markdown_of(report), report._repr_html_()
    assert len(page) + len(html) < 10_000
    rows = [line for line in page.splitlines() if "alert(1)" in line]
    assert len(rows) == 3
    for row in rows:
        assert row.startswith("  - answer: `")
        assert row.count("`") == 2
        assert row.endswith("`")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    for text in (page, html):
        assert all(character.isprintable() for character in text.replace("\n", ""))
