"""`validate` in Prefect: artifacts, the saved block, events, the gate."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.filters import FlowRunFilter

from tests.conftest import IN_PREFECT
from tests.eventually import eventually
from tests.scripts import running_script
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from tests.validation.quiz import (
    SVG,
    artifact,
    events_of,
    history,
    loaded,
    of,
    questions,
    right_of,
    said,
    saved,
    validated,
)
from vllm_tasks import Datalayer, Dataset, GateFailed, InvalidCall, Metric, VllmAPI, VllmModel, validate
from vllm_tasks.flows.validate_model import validate_model
from vllm_tasks.results import ValidationReport
from vllm_tasks.tasks import save_metric_values

pytestmark = IN_PREFECT


# ---------------------------------------------------------------------- what is shown


def test_a_validation_is_shown_as_a_table_and_a_page(model: VllmAPI) -> None:
    """The table has a row for each metric, the page the value, its interval and the history as a picture."""
    validation = of(metrics=[Metric(identifier="exact_match"), Metric(identifier="output_tokens")])
    _, report = validated(model, validation)
    table = artifact(f"{model.identifier}-ten-metrics")
    rows = {row["metric"]: row for row in json.loads(str(table.data))}
    assert rows.keys() == {"exact_match", "output_tokens"}
    (value, _) = report.datasets[0].values
    assert rows["exact_match"] == {
        "metric": "exact_match",
        "value": 0.8,
        "95 % from": round(value.low, 6),
        "to": round(value.high, 6),
        "rows": 10,
        "failed": 0,
        "truncated": 0,
        "change": "",
        "verdict": "passed",
    }
    page = str(artifact(f"{model.identifier}-ten-validation").data)
    for words in ("**Passed.**", "**0.8**", "10 rows; no row failed", "no run to compare with"):
        assert words in page
    (picture,) = SVG.findall(page)
    root = ElementTree.fromstring(base64.b64decode(picture))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "exact_match" in "".join(root.itertext())


def test_the_page_shows_what_changed_most(model: VllmAPI, server: ScriptedServer) -> None:
    """Improved and regressed rows against the last run are there with question, target and both answers."""
    validated(model, of())
    server.script = said(lambda prompt: "wrong" if prompt == "q0" else prompt.replace("q", "a"))
    _, report = validated(model, of())
    page = str(artifact(f"{model.identifier}-ten-validation").data)
    regressed, _, improved = page.partition("## Most improved rows in exact_match")
    changed = (
        "score 1 → 0\n  - input: `q0`\n  - expected: `a0`\n  - answer before: `a0`\n  - answer now: `wrong`"
    )
    assert changed in regressed
    for i in (8, 9):
        texts = f"input: `q{i}`\n  - expected: `a{i}`\n  - answer before: `wrong`\n  - answer now: `a{i}`"
        assert f"score 0 → 1\n  - {texts}" in improved
    (verdict,) = report.datasets[0].verdicts
    assert verdict.paired is not None
    assert verdict.paired.difference == pytest.approx(0.1)
    assert "+0.1" in regressed


HOSTILE = "a | b ` c \\\n\r\n# Head\u2028<script>alert(1)</script>\x00 ![x](http://evil) {{ y }}"


def test_contents_cannot_break_the_page(model: VllmAPI, server: ScriptedServer) -> None:
    """Bars, backticks, line ends, HTML and lone surrogates in texts stay in the code of their cells."""
    # Half a character is no prompt and no answer, but may be expected.
    rows = [{"question": f"{i} {HOSTILE}", "answer": [HOSTILE, "\ud800"]} for i in range(3)]
    validation = of(datasets=[Dataset(identifier="hostile", raw_data=rows)])

    @flow  # without parameters: Prefect itself could not send these
    def inside() -> ValidationReport:
        return validate(model, validation)

    server.script = said(lambda _: HOSTILE)
    inside()
    server.script = said(lambda prompt: "plain" if prompt[0] == "1" else HOSTILE)
    inside()
    page = str(artifact(f"{model.identifier}-hostile-validation").data)
    lines = page.splitlines()
    shown = [line for line in lines if "script" in line]
    assert len(shown) >= 5, "inputs, targets and answers of the changed row and the worst one"
    for line in shown:
        assert re.match("  - (input|expected|answer|answer before|answer now): `", line)
        assert line.count("`") == 2
        assert line.endswith("`")
    assert "# Head" not in lines
    assert "\x00" not in page


def test_no_contents_are_shown_where_none_may_be(model: VllmAPI, server: ScriptedServer) -> None:
    """With `rows_shown=0` the artifacts have figures and classes, but neither questions nor answers."""
    validation = of(metrics=[Metric(identifier="exact_match"), Metric(identifier="macro_f1")], rows_shown=0)
    validated(model, validation)
    server.script = said(lambda prompt: f"secret of {prompt}")
    _, report = validated(model, validation)
    page = str(artifact(f"{model.identifier}-ten-validation").data)
    assert "-0.8" in page
    assert "`a0`" in page
    table = artifact(f"{model.identifier}-ten-metrics")
    for shown in (
        SVG.sub("", page),
        *map(base64.b64decode, SVG.findall(page)),
        table.data,
        table.description,
    ):
        assert not re.search(r"secret|\bq\d\b", str(shown))
    assert report.datasets[0].changed == ()


# ---------------------------------------------------------------------- the saved block


def test_values_go_into_the_saved_block_and_nothing_else_changes(
    server: ScriptedServer, lake: Datalayer, name: str
) -> None:
    """The secret, the referenced block, values of other data sets and concurrent edits stay."""
    server.script = said(right_of(8))
    values = {"other": {"exact_match": 0.5}, "ten": {"old": 1.0}}
    with saved(name, server, lake, api_key="sk-secret", metric_values=values, validation=of()) as model:
        block = model._block_document_id
        assert block is not None
        before = loaded(name)
        with get_client(sync_client=True) as client:
            edited = {
                "timeout": 77.0,
                "db": {"$ref": {"block_document_id": str(model.db._block_document_id)}},
            }  # type: ignore[union-attr]
            client.update_block_document(block, BlockDocumentUpdate(data=edited))
        validated(model)
        assert model.metric_values["ten"] == {"exact_match": 0.8}
    after = loaded(name)
    assert after.metric_values == {"other": {"exact_match": 0.5}, "ten": {"exact_match": 0.8}}
    assert after.timeout == 77.0
    assert after.api_key is not None
    assert after.api_key.get_secret_value() == "sk-secret"
    assert after.db is not None
    assert after.db._block_document_name == f"{name}-lake"
    changed = {"metric_values", "timeout"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)


NESTED: dict[str, dict[str, Any]] = {
    "plain": {"system": "s", "predict_kwargs": {"max_tokens": 9, "stop": ["x"]}},
    "type": {
        "datatype": {"identifier": "t", "decoder": "json.loads", "encoder": "json.dumps"},
        "prompt_func": "tests.models.test_callables.shout",
    },
    "classes": {"datatype": {"classes": ["a", "b"]}},
    "schema": {"output_schema": {"name": "str"}, "artifacts": {"rules": {"uri": "memory://rules.txt"}}},
}


@pytest.mark.parametrize("kind", NESTED)
def test_values_of_a_changed_copy_are_not_those_of_the_block(
    server: ScriptedServer,
    lake: Datalayer,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """A copy that may answer otherwise leaves the block as it is, with a warning."""
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["json", "tests"]')
    server.script = said(right_of(8))
    with saved(f"{name}-plain", server, lake) as plain:
        _, report = validated(plain, of())
    with saved(name, server, lake, **NESTED[kind]) as model:
        for values, update in (
            ({}, {"prompt": "{input} anew"}),
            ({}, {"resample": 1}),
            ({}, {"api_url": "http://a"}),
        ):
            save_metric_values(model.model_copy(update=update), report)
            assert loaded(name).metric_values == values
            assert f"differs from it in {next(iter(update))}" in caplog.records[-1].getMessage()
        save_metric_values(model.model_copy(update={"timeout": 5.0, "uuid": "u", "keep": ["prompt"]}), report)
        assert loaded(name).metric_values == report.metric_values
        model.save(name, overwrite=True)
        assert loaded(name).metric_values == {}
        save_metric_values(model, report)
        assert loaded(name).metric_values == report.metric_values


def test_data_sets_validated_at_once_do_not_lose_each_other(
    server: ScriptedServer, lake: Datalayer, name: str
) -> None:
    """If data sets are submitted together, the values of each get into the block and the history."""
    server.script = said(right_of(8))
    names = [f"d{i}" for i in range(4)]

    @flow
    def at_once(model: VllmAPI) -> list[ValidationReport]:
        runs = [validate.submit(model, of(*names), datasets=[name]) for name in names]
        return [run.result() for run in runs]

    with saved(name, server, lake) as model:
        reports = at_once(model)
        values = {name: {"exact_match": 0.8} for name in names}
        assert model.metric_values == values
    assert loaded(name).metric_values == values
    assert [d.dataset for report in reports for d in report.datasets] == names
    assert sorted(row["dataset"] for row in history(lake)) == names


def test_a_block_that_was_deleted_meanwhile_is_no_failure(
    server: ScriptedServer, lake: Datalayer, name: str
) -> None:
    """The values cannot be saved in the block then, but the validation is recorded."""
    with saved(name, server, lake) as model:
        VllmAPI.delete(name)
        _, report = validated(model, of())
    assert [row["run"] for row in history(lake)] == [report.datasets[0].run]


# ---------------------------------------------------------------------- gate and event


def test_a_model_that_passes_is_told_to_automations(model: VllmAPI, lake: Datalayer) -> None:
    """One event for all data sets has their values and is related to the flow; its run is in the history."""
    run, report = validated(model, of("a", "b"))
    (event,) = events_of(model.identifier, 1)
    assert event["event"] == "vllm-tasks.validation.passed"
    assert event["payload"] == {
        "metric_values": {"a": {"exact_match": 0.8}, "b": {"exact_match": 0.8}},
        "reasons": [],
        "runs": {d.dataset: d.run for d in report.datasets},
    }
    related = {(r["prefect.resource.role"], r.get("prefect.resource.name")) for r in event["related"]}
    assert ("flow", "validated") in related
    assert {row["flow_run"] for row in history(lake)} == {str(run)}


def test_a_model_that_fails_is_recorded_shown_and_told_before(
    server: ScriptedServer, lake: Datalayer, name: str
) -> None:
    """GateFailed comes last: history, artifacts, block and event are there, and the run has the reason."""
    server.script = said(right_of(8))
    with saved(name, server, lake) as model:
        state = validated(model, of(thresholds={"exact_match": 0.9}), return_state=True)
    assert state.is_failed()
    reason = "ten: exact_match is 0.8 (0.4422 to 0.9646, n=10, approximate), below its threshold of 0.9"
    assert reason in (state.message or "")
    with pytest.raises(GateFailed, match="did not pass") as caught:
        state.result()
    assert caught.value.report.metric_values == {"ten": {"exact_match": 0.8}}
    (row,) = history(lake)
    assert (row["value"], row["passed"], row["reason"]) == (0.8, False, reason.removeprefix("ten: "))
    assert "**Failed.** ten: exact_match is 0.8" in str(artifact(f"{name}-ten-validation").data)
    assert "failed: ten: exact_match" in str(artifact(f"{name}-ten-metrics").description)
    assert loaded(name).metric_values == {"ten": {"exact_match": 0.8}}
    (event,) = events_of(name, 1)
    assert event["event"] == "vllm-tasks.validation.failed"
    assert event["payload"]["reasons"] == [reason]


def test_some_of_the_data_sets_are_no_verdict_on_the_model(model: VllmAPI) -> None:
    """With `datasets` no event is sent, so that no automation starts on a part."""
    validated(model, of("a", "b"), datasets=["a"])
    validated(model, of("a", "b"))
    (event,) = events_of(model.identifier, 1)
    assert event["payload"]["metric_values"].keys() == {"a", "b"}


def test_a_run_is_gone_on_with_when_the_server_was_lost(
    model: VllmAPI, server: ScriptedServer, lake: Datalayer
) -> None:
    """A flow that failed early keeps its answers; the next one sends the rest, and records one run."""
    server.script = said(lambda prompt: None if prompt > "q4" else prompt.replace("q", "a"))
    state = validated(model, of(), max_failed=0, return_state=True)
    assert state.is_failed()
    assert not (Path(lake.url.get_secret_value()) / "_metric_values").exists()
    server.script = said(right_of(8))
    _, report = validated(model, of(), retry_failed=True)
    assert report.metric_values == {"ten": {"exact_match": 0.8}}
    assert len(history(lake)) == 1


def test_what_is_committed_is_not_called_rolled_back(model: VllmAPI) -> None:
    """If the gate fails the task, its commits and scores stay and are displayed as completed."""
    state = validated(model, of(thresholds={"exact_match": 0.9}), return_state=True)
    run = state.state_details.flow_run_id
    expected = {"validate": "Failed", model.identifier: "Completed", "scores": "Completed"}

    def states() -> dict[str, str | None]:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
        return {task.name.partition(" ")[0]: task.state.name for task in found if task.state}

    with get_client(sync_client=True) as client:
        eventually(lambda: states() == expected)  # Prefect writes them after the run
        assert states() == expected


@pytest.mark.engine
def test_reuse_scores_the_answers_of_a_model_that_is_known(local_model: VllmModel, lake: Datalayer) -> None:
    """Weights in a local folder are known: the second run sends nothing and has the same values."""
    _, first = validated(local_model, of(), db=lake)
    _, second = validated(local_model, of(), db=lake, reuse=True)
    assert (first.datasets[0].processed, second.datasets[0].processed) == (10, 0)
    assert second.datasets[0].values == first.datasets[0].values


def test_reuse_is_refused_of_a_server(model: VllmAPI, server: ScriptedServer) -> None:
    """The weights of a server are unknown, so the flow fails before any row is sent."""
    state = validated(model, of(), reuse=True, return_state=True)
    with pytest.raises(InvalidCall, match="the weights of a server are not known"):
        state.result()
    assert not server.posts


# ---------------------------------------------------------------------- saved blocks by name


def test_a_data_set_may_come_from_another_saved_datalayer(
    model: VllmAPI, name: str, tmp_path: Path, lake: Datalayer
) -> None:
    """Rows are read from the datalayer that `db` names; answers and history stay with the model."""
    (tmp_path / "elsewhere").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in questions())
    (tmp_path / "elsewhere" / "held_out.jsonl").write_text(lines)
    Datalayer(url=str(tmp_path / "elsewhere")).save(name)
    held_out = of(datasets=[Dataset(identifier="held", select="held_out", db=name)])
    assert validated(model, held_out)[1].metric_values == {"held": {"exact_match": 0.8}}
    assert validate_model(model, held_out).metric_values == {"held": {"exact_match": 0.8}}
    assert len(history(lake)) == 2


def test_a_datalayer_that_is_not_there_is_named(model: VllmAPI, server: ScriptedServer) -> None:
    """A data set with the name of no saved Datalayer fails the call before any row is sent."""
    absent = of(datasets=[Dataset(identifier="held", select="held_out", db="no-such-lake")])
    with pytest.raises(InvalidCall, match="'no-such-lake' is neither a folder here nor the name of a saved"):
        validated(model, absent)
    assert not server.posts


def test_a_saved_model_may_judge(model: VllmAPI, server: ScriptedServer, name: str) -> None:
    """`vllm-api/NAME` scores each answer, and the value is the mean of its scores."""

    def words(prompt: str) -> str:
        return right_of(8)(prompt) if prompt[0] == "q" else json.dumps({"reason": "so", "score": 4})

    server.script = lambda asked: verdict(asked) if "messages" in (asked.body or {}) else said(words)(asked)

    def verdict(asked: Asked) -> Reply:
        reply = usual(asked)
        reply.body["choices"][0]["message"]["content"] = words("?")
        return reply

    VllmAPI(identifier="judge", api_url=server.url, model="j", retries=0).save(name)
    options = {"model": f"vllm-api/{name}", "rubric": "Is it right?", "scale": [1, 5]}
    metrics = [Metric(identifier="exact_match"), Metric(identifier="good", object="judge", options=options)]
    _, report = validated(model, of(metrics=metrics))
    assert report.metric_values == {"ten": {"exact_match": 0.8, "good": 0.75}}
    absent = Metric(identifier="good", object="judge", options={**options, "model": "vllm-api/no-such"})
    with pytest.raises(InvalidCall, match="there is no saved block 'vllm-api/no-such'"):
        validated(model, of(metrics=[absent]))


# ---------------------------------------------------------------------- cancelling


JOB = """
import sys
from prefect import flow
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmAPI, validate

@flow
def job(submit: bool):
    model = VllmAPI(identifier="m", api_url=sys.argv[1], db={"url": sys.argv[2]}, max_in_flight=8, model="x")
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(100)]
    validation = Validation(
        datasets=[Dataset(identifier="many", raw_data=rows)],
        metrics=[Metric(identifier="exact_match")],
        key=("question", "answer"),
    )
    if submit:
        validate.submit(model, validation).result()
    else:
        validate(model, validation)

job(submit=sys.argv[3] == "submit")
"""


@pytest.mark.parametrize("how", ["call", pytest.param("submit", marks=pytest.mark.long)])
def test_a_flow_that_is_told_to_end_goes_on_the_next_time(
    lake: Datalayer, server: ScriptedServer, tmp_path: Path, how: str
) -> None:
    """After SIGTERM, Prefect's way to cancel, completed rows are committed and not sent again."""
    answered = 30

    async def script(asked: Asked) -> Reply | None:
        if asked.body and len(server.posts) > answered:
            await asyncio.sleep(3600)
        return said(right_of(80))(asked)  # type: ignore[return-value]

    server.script = script
    with running_script(tmp_path, JOB, server.url, lake.url.get_secret_value(), how) as job:
        server.wait_until(lambda: len(server.posts) == answered + 8)
        time.sleep(1)  # the last answers arrive
        job.terminate()
        assert job.wait() != 0
        assert not (Path(lake.url.get_secret_value()) / "_metric_values").exists()
    finished = {asked.prompt for asked in server.posts[:answered]}
    server.script = said(right_of(80))
    server.requests.clear()
    with running_script(tmp_path, JOB, server.url, lake.url.get_secret_value(), how) as job:
        assert job.wait() == 0
    asked = [asked.prompt for asked in server.posts]
    assert len(asked) == len(set(asked)) == 100 - answered
    assert not finished & set(asked)
    (row,) = history(lake)
    assert (row["value"], row["n"]) == (0.8, 100)
