"""`predict_in_db` in Prefect: task runs, artifacts, assets, failure, cancelling, the deployable flow."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TaskRun
from prefect.client.schemas.sorting import LogSort
from prefect.runtime import flow_run
from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings

from tests.artifacts import artifacts
from tests.conftest import IN_PREFECT
from tests.events import events_where
from tests.eventually import LONG_ENOUGH, eventually
from tests.lettered import by_words, lettered
from tests.places import Place
from tests.scripts import running_script
from tests.served import run_when_served
from tests.servers.scripted_server import Asked, ScriptedServer, answer_to, refused
from vllm_tasks import Classes, InvalidCall, VllmAPI, predict_in_db
from vllm_tasks.artifacts import ProgressArtifact, asset_key, markdown_of, slug
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.flows.batch_predict import batch_predict
from vllm_tasks.results import Report
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import ErrorKind

pytestmark = IN_PREFECT


@pytest.fixture
def lake(tmp_path: Path) -> Place:
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*(f"t{i}" for i in range(100)))
    return place


@pytest.fixture
def model(server: ScriptedServer, lake: Place) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="org/Model", api_url=server.url, db=lake.db, retries=0) as model:
        yield model


@flow
def over_a_table(model: VllmAPI, **options: Any) -> tuple[UUID, Report]:
    report = predict_in_db(model, "text", "rows", **options)
    return UUID(flow_run.id), report


def task_runs(run: UUID) -> list[TaskRun]:
    """The task runs of a flow run, once Prefect has written them down, which it does later."""
    with get_client(sync_client=True) as client:
        for _ in range(100):
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
            if found and all(t.state and t.state.is_final() for t in found):
                return found
            time.sleep(0.1)
    raise AssertionError(f"the task runs did not end: {[(t.name, t.state) for t in found]}")


def test_each_commit_is_a_task_run(model: VllmAPI, lake: Place) -> None:
    """In a flow, each group is a task run named by model and keys, beside the task itself."""
    run, report = over_a_table(model, max_chunk_size=40)
    assert report.succeeded == 100
    names = sorted(t.name for t in task_runs(run))
    groups = [name for name in names if name.startswith("org-Model ") and ".." in name]
    assert len(groups) == report.commits == 3
    assert "org-Model - rows" in names
    assert lake.answers("org-Model") == {i: answer_to(f"t{i}") for i in range(100)}


def test_progress_and_report_are_artifacts(model: VllmAPI, server: ScriptedServer) -> None:
    """The UI shows progress, a report with causes of errors and three answers, and a table of errors."""
    server.script = lambda asked: refused(400, "no") if asked.prompt == "t7" else None
    _, report = over_a_table(model, predict_id="Shown Here", max_failed=None)
    (progress,) = artifacts("shown-here-progress")
    assert progress.data == 100.0
    assert "100 of 100 rows done, 1 failed" in (progress.description or "")
    (shown,) = artifacts("shown-here-report")
    assert isinstance(shown.data, str)
    assert shown.data == markdown_of(report)
    cause = "**1 row: the request was refused (refused)**"
    for words in ("| completed | 99 |", "| failed | 1 |", cause, "`'no'`", "keys: `7`", report.outputs):
        assert words in shown.data
    assert len(report.samples) == 3
    for (key,), answer in [(sample.key, sample.answer.strip()) for sample in report.samples]:
        assert answer == f"t{key}!"
        assert f"- key `{key}`\n  - answer: `{answer}`\n" in shown.data
    assert "t7`" not in shown.data
    (errors,) = artifacts("shown-here-errors")
    assert '"key": "7"' in str(errors.data)


def test_a_display_that_outlives_its_flow_run_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Prefect closes the run's client at its end; an update that its server held until then is given up."""

    @flow
    def ended() -> contextvars.Context:
        return contextvars.copy_context()

    shown = ProgressArtifact("outlives-its-run")
    ended().run(shown._send, Progress(10, 5, 0, 0, 1.0), False)
    assert "progress could not be displayed" in caplog.text
    assert artifacts("outlives-its-run-progress") == []


def test_outputs_are_an_asset_of_their_source(model: VllmAPI) -> None:
    """A materialization event names the outputs, the source as their origin, and the counts of the run."""
    _, report = over_a_table(model, predict_id="lineage")
    asset = asset_key(report.outputs)
    succeeded = {"prefix": ["prefect.asset.materialization.succeeded"]}
    (event,) = events_where(1, event=succeeded, resource={"id": [asset]})
    assert asset_key(report.source) in [r["prefect.resource.id"] for r in event["related"]]
    assert event["resource"]["prefect.asset.url"].endswith("/artifacts/key/lineage-report")
    assert (event["payload"]["predict_id"], event["payload"]["succeeded"]) == ("lineage", 100)


def test_a_run_over_a_table_is_an_event(lake: Place, server: ScriptedServer) -> None:
    """Automations can wait for it; one with too many failed rows has another name."""
    with VllmAPI(identifier="evented", api_url=server.url, db=lake.db) as model:
        over_a_table(model)
        server.script = lambda request: refused(400, "no") if request.body else None
        over_a_table(model, predict_id="none-succeeds", return_state=True)
    completed, failed = events_where(2, resource={"id": ["vllm-tasks.model.evented"]})
    assert completed["event"] == "vllm-tasks.predictions.completed"
    assert failed["event"] == "vllm-tasks.predictions.failed"
    counts = {name: completed["payload"][name] for name in ("predict_id", "processed", "succeeded", "failed")}
    assert counts == {"predict_id": "evented", "processed": 100, "succeeded": 100, "failed": 0}
    assert failed["payload"]["failed"] > 0


def test_a_run_that_a_budget_ended_has_an_event_of_its_own(lake: Place, server: ScriptedServer) -> None:
    """So that nothing starts which needs the complete table; its progress and report say what is left."""
    with VllmAPI(identifier="budgeted", api_url=server.url, db=lake.db, max_in_flight=2) as model:
        _, report = over_a_table(model, max_total_tokens=80)
    assert 10 <= report.processed < 100
    (event,) = events_where(1, resource={"id": ["vllm-tasks.model.budgeted"]})
    assert event["event"] == "vllm-tasks.predictions.stopped"
    assert event["payload"]["stopped_by"] == "max_total_tokens"
    assert event["payload"]["remaining"] == report.remaining == 100 - report.processed
    (progress,) = artifacts("budgeted-progress")
    assert float(str(progress.data)) < 100.0
    assert "stopped by max_total_tokens" in (progress.description or "")
    (shown,) = artifacts("budgeted-report")
    assert f"| left to the next run: stopped by max_total_tokens | {report.remaining} |" in str(shown.data)


def test_rows_for_a_person_are_an_event(lake: Place, server: ScriptedServer) -> None:
    """An automation can call a person, who finds keys, labels and probabilities, and no text, in a table."""
    server.script = lettered(by_words({"t5": (0.75, 0.25), "t7": (0.4, 0.6)}, otherwise=(0.9, 0.1)))
    unsure = Classes(["bug", "feature"], review_below=0.8)
    with VllmAPI(identifier="unsure", api_url=server.url, db=lake.db, datatype=unsure) as model:
        _, report = over_a_table(model, predict_id="kinds")
        over_a_table(model, predict_id="kinds")
    requested = {"event": {"name": ["vllm-tasks.reviews.requested"]}}
    (event,) = events_where(1, **requested, resource={"id": ["vllm-tasks.model.unsure"]})
    # The texts are t0 to t99, so ten more have a "t5" or "t7" in them each.
    assert (report.to_review, len(report.reviews)) == (22, 22)
    assert event["payload"] == {
        "predict_id": "kinds",
        "to_review": 22,
        "review_below": 0.8,
        "source": report.source,
        "outputs": report.outputs,
    }
    (shown,) = artifacts("kinds-reviews")
    assert "22 of 22 rows for review of kinds" in (shown.description or "")
    first, *_, last = json.loads(str(shown.data))
    assert (first["label"], first["probability"]) == ("feature", "0.600")
    assert (last["label"], last["probability"]) == ("bug", "0.750")
    assert set(first) == {"key", "label", "probability"}


def test_too_many_failures_fail_the_flow_with_a_report(model: VllmAPI, server: ScriptedServer) -> None:
    """The flow run ends as Failed, with its report."""
    server.script = lambda asked: refused(400, "no") if asked.body else None
    state = over_a_table(model, predict_id="hopeless", return_state=True)
    assert state.is_failed()
    with pytest.raises(TooManyFailed, match=r"rows failed|all failed alike"):
        state.result()
    (shown,) = artifacts("hopeless-report")
    assert "| completed | 0 |" in str(shown.data)


def test_a_commit_is_retried_by_prefect(
    model: VllmAPI, lake: Place, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a lake cannot be written for a moment, the task run retries, and no row is sent again."""
    over_a_table(model, predict_id="retried", limit=10)
    log = Path(lake.url) / "_outputs__retried" / "_delta_log"
    asked = len(server.posts)

    async def block_until_asked(asked_now: Asked) -> None:
        if asked_now.body and log.is_dir():
            log.rename(log.with_name("away"))
            log.write_text("in the way")

    server.script = block_until_asked

    def free() -> None:
        server.wait_until(lambda: len(server.posts) == asked + 90)
        time.sleep(0.5)
        log.unlink()
        log.with_name("away").rename(log)

    freeing = threading.Thread(target=free)
    freeing.start()
    run, report = over_a_table(model, predict_id="retried")
    freeing.join()
    assert report.succeeded == 90
    assert len(server.posts) == asked + 90
    assert max(t.run_count for t in task_runs(run) if ".." in t.name) > 1


def test_the_task_works_submitted_and_outside_of_flows(model: VllmAPI, lake: Place) -> None:
    """Submitted, the task returns a future; outside of a flow it works in the same way."""

    @flow
    def submitted() -> Report:
        return predict_in_db.submit(model, "text", "rows", predict_id="s").result()

    assert submitted().succeeded == 100
    with temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}):
        assert predict_in_db(model, "text", "rows", predict_id="o").succeeded == 100
    assert lake.answers("s") == lake.answers("o")


JOB = """
import sys
from prefect import flow
from vllm_tasks import VllmAPI, predict_in_db

@flow
def job(submit: bool):
    model = VllmAPI(identifier="m", api_url=sys.argv[1], db={"url": sys.argv[2]}, max_in_flight=8, model="x")
    if submit:
        predict_in_db.submit(model, "text", "rows").result()
    else:
        predict_in_db(model, "text", "rows")

job(submit=sys.argv[3] == "submit")
"""


@pytest.mark.parametrize(
    ("way", "how"), [(signal.SIGTERM, "call"), (signal.SIGTERM, "submit"), (signal.SIGINT, "call")]
)
def test_a_flow_that_is_told_to_end_commits_what_is_finished(
    lake: Place, server: ScriptedServer, tmp_path: Path, way: signal.Signals, how: str
) -> None:
    """SIGTERM, which is how Prefect cancels, and Ctrl-C: what is finished is committed, the rest dropped."""
    answered = 30

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > answered:
            await asyncio.sleep(3600)

    server.script = script
    with running_script(tmp_path, JOB, server.url, lake.url, how) as job:
        server.wait_until(lambda: len(server.posts) == answered + 8)
        time.sleep(1)  # the last answers arrive
        job.send_signal(way)
        job.wait(LONG_ENOUGH)
    assert job.returncode != 0
    assert len(lake.answers()) == answered


LOGGED = """
import sys
from prefect import flow, get_run_logger
from vllm_tasks import VllmAPI, predict_in_db

@flow(name="logged")
def job(url: str, tables: str) -> None:
    predict_in_db(
        VllmAPI(identifier="m", api_url=url, db={"url": tables}, max_in_flight=16), "text", "rows"
    )

job(*sys.argv[1:])
"""


def test_the_logs_of_a_run_have_the_lines_of_the_package(
    lake: Place, server: ScriptedServer, tmp_path: Path
) -> None:
    """Without any setting: that a server is waited for, at the start and under way; and the progress."""

    async def slowly(request: Asked) -> None:
        if request.body:
            await asyncio.sleep(1)

    server.script = slowly
    server.stop()
    with running_script(tmp_path, LOGGED, server.url, lake.url) as job:

        def logged(words: str) -> int:
            newest = LogSort.TIMESTAMP_DESC
            with get_client(sync_client=True) as client:
                return sum(words in log.message for log in client.read_logs(sort=newest))

        away = f"no server responds at {server.url}; waiting up to"
        assert eventually(lambda: logged(away) == 1)
        server.start()
        server.wait_until(lambda: len(server.posts) > 20)
        server.stop()
        assert eventually(lambda: logged(away) == 2)
        server.start()
        assert job.wait() == 0
        assert eventually(lambda: logged("100 of 100 rows done"))


def test_the_deployable_flow_does_the_job(model: VllmAPI, lake: Place) -> None:
    """`vllm_tasks.flows.batch_predict` takes the same arguments, and its run is named by model and source."""
    report = batch_predict(model, "text", "rows", predict_id="deployed", sampling={"temperature": 0})
    assert report.succeeded == 100
    with pytest.raises(InvalidCall, match="temperature"):
        batch_predict(model, "text", "rows", sampling={"temprature": 0})


def test_the_deployable_flow_runs_when_served(lake: Place, server: ScriptedServer) -> None:
    """Served as in the README, a run that is created from a form works in a process of its own."""
    fields = {"identifier": "m", "api_url": server.url}
    form = {"model": fields, "X": "text", "select": "rows", "db": {"url": lake.url}, "max_failed": 3}
    run_when_served("batch_predict", form)
    assert lake.answers() == {i: answer_to(f"t{i}") for i in range(100)}


def test_the_deployable_flow_has_a_good_form() -> None:
    """Every parameter has a description, models are picked as blocks, and only three are required."""
    schema = batch_predict.parameters
    properties = schema.properties
    assert schema.required == ["model", "X", "select"]
    assert not [name for name, p in properties.items() if not p.get("description")]
    slugs = {d.get("block_type_slug") for d in schema.definitions.values()}
    assert {"vllm-api", "vllm-model", "vllm-datalayer"} <= slugs


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("/data/lake/_outputs__m", "file:///data/lake/_outputs__m"),
        ("s3://bucket/a b/_outputs__m", "s3://bucket/a_b/_outputs__m~HASH"),
        ("/x/#1?[y]", "file:///x/_1__y_~HASH"),
    ],
)
def test_places_become_asset_keys(place: str, key: str) -> None:
    """An asset key is a URI; in place of characters that Prefect refuses, it has a hash at its end."""
    assert re.sub("~[0-9a-f]{6}$", "~HASH", asset_key(place)) == key


def test_a_report_cannot_break_its_markdown() -> None:
    """Keys and names with bars, backticks and line ends stay in their cells."""
    report = Report(
        model="m|`", predict_id="p\n# x", source="s", outputs="/o", fingerprint="f" * 64, rows=None,
        up_to_date=None, processed=1, succeeded=0, failed=1, truncated=0, prompt_tokens=0,
        completion_tokens=0, commits=1, seconds={"total": 1.0},
        errors=(ErrorKind("prompt", 1, (("a|b\n`c",),)),),
    )  # fmt: skip
    lines = markdown_of(report).splitlines()
    assert lines[0] == "# p # x"
    assert "  - keys: `a b� c`" in lines
    assert slug("p\n# x") == "p-x"


def test_progress_tells_rates_and_time_left() -> None:
    """Rows a second, tokens a second and what is left at that rate."""
    assert str(Progress(1000, 240, 10, 5000, 50.0)) == (
        "250 of 1,000 rows done, 10 failed, 5.0 rows/s, 100 tokens/s, 2 min 30 s left"
    )
    assert str(Progress(None, 0, 0, 0, 1.0)) == "0 rows done, 0 failed, 0.0 rows/s, 0 tokens/s"
    assert str(Progress(10**6, 1, 0, 0, 10.0)).endswith("2777 h 46 min left")


def test_mapping_goes_over_models_and_over_tables(lake: Place, server: ScriptedServer) -> None:
    """A Datalayer as `db` and a list of columns as `X` go to each call unchanged."""

    def model(name: str) -> VllmAPI:
        return VllmAPI(
            identifier=name, api_url=server.url, signature="**kwargs", prompt=name + " {id} {text}"
        )

    @flow
    def compared() -> list[int]:
        models = [model("a"), model("b")]
        by_model = predict_in_db.map(models, ["id", "text"], "rows", db=lake.db, limit=2)
        named = ["p", "q"]
        by_table = predict_in_db.map(
            model("c"), ["id", "text"], ["rows", "rows.parquet"], db=lake.db, predict_id=named, limit=3
        )
        return [future.result().succeeded for future in (*by_model, *by_table)]

    assert compared() == [2, 2, 3, 3]
    assert sorted({asked.prompt.split()[0] for asked in server.posts}) == ["a", "b", "c"]
