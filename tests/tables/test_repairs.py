"""Repairs in tables: attempts, tokens and what they helped."""

from __future__ import annotations

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer
from tests.tables.runs import ask, changed, says
from vllm_tasks import Dataset, Metric, Validation, VllmAPI
from vllm_tasks.artifacts import markdown_of
from vllm_tasks.validation.comparison import compare


def number(asked: Asked) -> str:
    """Good at once, good when told, or never."""
    if asked.prompt.startswith("good"):
        return "1"
    return "2" if asked.prompt.startswith("told") and "Answer again" in asked.prompt else "none"


def test_attempts_and_tokens_are_kept(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A column says how many there were; tokens are those of all; the report says whether they helped."""
    place.fill_texts("good", "told", "never")
    server.script = says(number)
    report = ask(changed(model, datatype="int", repair=1, keep=["prompt"]))
    good, told, never = place.outputs()
    assert [row["_attempts"] for row in (good, told, never)] == [1, 2, 2]
    assert [row["output"] for row in (good, told, never)] == [1, 2, None]
    assert [(r["_prompt_tokens"], r["_completion_tokens"]) for r in (good, told)] == [(3, 5), (6, 10)]
    assert (good["_prompt"], told["_prompt"]) == ("good", "told")
    assert never["_error"] == "output: the answer is not an integer of 64 bits: none"
    assert (report.reasked, report.repaired, report.failed) == (2, 1, 1)
    assert (report.prompt_tokens, report.completion_tokens) == (3 * 5, 5 * 5)
    assert "1 of 2 rows that were attempted again were repaired" in str(report)
    assert "| attempted again, and repaired | 2, 1 |" in markdown_of(report)


def test_a_row_without_an_answer_has_one_attempt(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """And without `repair` or `resample` there is no such column."""
    place.fill_texts("a", "b")
    ask(changed(model, check=lambda value, row: None), predict_id="plain")
    assert "_attempts" not in place.outputs("plain")[0]
    server.script = lambda asked: Reply(status=400) if asked.prompt == "b" else None
    report = ask(changed(model, resample=1))
    assert [row["_attempts"] for row in place.outputs()] == [1, 1]
    assert (report.failed, report.reasked, report.repaired) == (1, 0, 0)


@pytest.mark.parametrize("field", ["repair", "resample"])
def test_a_list_of_rows_has_the_attempts_of_its_answer(
    model: VllmAPI, place: Place, server: ScriptedServer, field: str
) -> None:
    """With flatten each item of a repaired answer says so."""
    place.fill_texts("x")
    texts = iter(["no list", '["p", "q"]'])
    server.script = says(lambda _: next(texts))
    ask(changed(model, datatype="json", flatten=True, **{field: 1}))
    assert [(row["_position"], row["_attempts"]) for row in place.outputs()] == [(0, 2), (1, 2)]


def test_a_preview_repairs_as_the_run_would(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """It shows the row's own prompt and the last answer."""
    place.fill_texts("told")
    server.script = says(number)
    (row,) = changed(model, datatype="int", repair=1).preview("text", "rows").rows
    assert (row.prompt, row.answer, row.value, row.error) == ("told", "2", 2, None)


def test_what_a_repair_buys_is_measured_by_a_comparison(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """A model without repairs beside the same with them, on the same rows."""
    place.fill_texts("x")  # the place exists
    server.script = says(number)
    rows = [{"q": f"{word} {i}", "a": a} for i in range(3) for word, a in (("good", 1), ("told", 2))]
    validation = Validation(
        datasets=[Dataset(identifier="six", raw_data=rows)],
        metrics=[Metric(identifier="exact_match")],
        key=("q", "a"),
    )
    first = changed(model, identifier="first", datatype="int")
    second = changed(first, identifier="second", repair=1)
    reports = [each.validate(validation, max_failed=None) for each in (first, second)]
    assert [report.metric_values["six"]["exact_match"] for report in reports] == [0.5, 1.0]
    standing = compare([first, second], validation, reports).standings[1]
    assert standing.paired is not None
    assert standing.paired.difference == pytest.approx(0.5)
