"""Steps that run on a work pool: a real server, real process workers, and their deaths."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelling, Crashed, Running
from pydantic import SecretStr

from tests.conftest import IN_PREFECT, TINY_ARGS
from tests.lettered import lettered
from tests.places import Place
from tests.scripts import running_script
from tests.servers.pool_workers import Workers, pool, runs_of, state_of
from tests.servers.scripted_server import Asked, Deed, Reply, ScriptedServer, answer_to, refused
from tests.site import spoken_to
from vllm_tasks import (
    Classes,
    Datalayer,
    Dataset,
    GateFailed,
    InvalidCall,
    Metric,
    RowError,
    Validation,
    VllmAPI,
    VllmModel,
    predict_batches,
    predict_in_db,
    preview,
    validate,
)
from vllm_tasks.errors import EngineFailed, ServerUnavailable, TooManyFailed
from vllm_tasks.placement import payload
from vllm_tasks.placement.part import END_TIMEOUT, Part, Stage
from vllm_tasks.results import Completion, Report, ValidationReport
from vllm_tasks.tasks import completions

pytestmark = IN_PREFECT
ROWS = 300


@pytest.fixture(scope="module")
def prefect_server(ui: str) -> Iterator[None]:
    """The site's server, for its PostgreSQL: with SQLite a run may wait a minute for its start here."""
    with spoken_to(ui):
        yield


@pytest.fixture(scope="module")
def workers(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A pool with one worker."""
    with pool("tested", tmp_path_factory.mktemp("workers") / "log") as workers:
        workers.start()
        yield workers


@pytest.fixture
def lake(tmp_path: Path) -> Place:
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*(f"t{i}" for i in range(ROWS)))
    return place


@pytest.fixture
def model(server: ScriptedServer, workers: Workers) -> VllmAPI:
    return VllmAPI(
        identifier="m",
        api_url=server.url,
        model="scripted-model",
        max_in_flight=8,
        retries=0,
        compute_kwargs={"work_pool": workers.name},
    )


@flow
def over_a_table(model: VllmAPI | VllmModel, db: Datalayer | str, **options: Any) -> Report:
    report: Report = predict_in_db(model, "text", "rows", db=db, **options)
    return report


def exact(lake: Place) -> bool:
    return lake.answers() == {i: answer_to(f"t{i}") for i in range(ROWS)}


# ---------------------------------------------------------------------- what travels


def test_rows_are_asked_on_the_pool(model: VllmAPI, server: ScriptedServer) -> None:
    """Prompts go to a flow run on the pool; answers come back in order and are decoded here."""
    server.script = lambda asked: refused(400, "no") if asked.prompt == "b" else None
    typed = model.model_copy(update={"datatype": "bytes"})

    @flow
    def asks() -> tuple[list[Any], list[Any]]:
        return (
            predict_batches(typed, ["a", "b", None, "c"], on_error="return"),
            completions.submit(model, ["d"]).result(),
        )

    (a, b, nothing, c), (d,) = asks()
    assert (a, c) == (b" a!", b" c!")
    assert isinstance(b, RowError)
    assert (b.kind, b.index) == ("refused", 1)
    assert isinstance(nothing, RowError)
    assert nothing.kind == "prompt"
    assert isinstance(d, Completion)
    assert (d.text, d.completion_tokens) == (" d!", 5)
    (run,) = runs_of("m - 3 rows")
    assert run.work_pool_name == "tested"
    assert '"a"' not in json.dumps(run.parameters), "rows do not stand in the parameters"


def test_rows_keep_their_own_parameters(model: VllmAPI, server: ScriptedServer, lake: Place) -> None:
    """Of rows that travel (a preview), and of a table, where the names of the columns do."""

    @flow
    def asks() -> None:
        preview(model, "text", "rows", 3, db=lake.db, sampling_columns={"seed": "id"})
        predict_in_db(model, "text", "rows", limit=3, db=lake.db, sampling_columns={"seed": "id"})

    asks()
    assert [post.prompt == f"t{post.body['seed']}" for post in server.posts] == [True] * 6


def test_classes_do_not_think_on_the_pool(model: VllmAPI, server: ScriptedServer) -> None:
    """The engine's side knows that texts become chat, and switches thinking off."""
    server.tokenizes, server.script = Reply({"count": 3}), lettered(lambda _: (0.75, 0.25))

    @flow
    def asks() -> list[Any]:
        return predict_batches(model.model_copy(update={"datatype": Classes(["a", "b"])}), ["x"])

    (found,) = asks()
    assert (found["label"], found["probability"]) == ("a", pytest.approx(0.75))
    assert server.posts[0].body["chat_template_kwargs"] == {"enable_thinking": False}


def test_whether_texts_are_chat_is_known_on_the_pool(model: VllmAPI, server: ScriptedServer) -> None:
    """Texts travel as texts; the engine's side makes messages of them, with its system message."""
    server.tokenizes = Reply({"count": 3})
    told = model.model_copy(update={"system": "S"})

    @flow
    def asks() -> list[Any]:
        found: list[Any] = predict_batches(told, ["a", "b"])
        return found

    assert asks() == [answer_to("a"), answer_to("b")]
    assert {tuple(m["content"] for m in r.body["messages"]) for r in server.posts} == {("S", "a"), ("S", "b")}
    assert [r.path for r in server.requests].count("/tokenize") == 1


def test_a_saved_block_travels_as_a_reference_and_a_secret_not_at_all(model: VllmAPI) -> None:
    """A key that is saved works on the pool; one that is not, or that was changed, is refused."""
    keyed = model.model_copy(update={"api_key": SecretStr("topsecret")})

    @flow
    def asks(model: VllmAPI) -> list[Any]:
        return predict_batches(model, ["a", "b", "c", "d"])

    with pytest.raises(InvalidCall, match="api_key, which would be readable"):
        asks(keyed)
    keyed.save("routed", overwrite=True)
    try:
        loaded = VllmAPI.load("routed")
        assert asks(loaded) == [answer_to(x) for x in "abcd"]
        (run,) = runs_of("m - 4 rows")
        assert set(run.parameters["model"]) == {"$ref"}
        assert "topsecret" not in json.dumps(run.parameters)
        loaded.prompt = "changed {input}"
        with pytest.raises(InvalidCall, match="api_key"):
            asks(loaded)
    finally:
        VllmAPI.delete("routed")


def test_a_database_password_does_not_travel(model: VllmAPI) -> None:
    """A URL with a password is refused unless it is a saved block's."""
    with pytest.raises(InvalidCall, match="has a password") as caught:
        over_a_table(model, "postgresql://me:hidden@db.example/crm")
    assert "hidden" not in str(caught.value)


# ---------------------------------------------------------------------- tables


def test_shards_are_one_table_and_one_report(model: VllmAPI, lake: Place, server: ScriptedServer) -> None:
    """Three flow runs process each row once, and are reported as one run."""
    server.script = lambda asked: refused(400, "no") if asked.prompt in ("t7", "t8") else None
    report = over_a_table(model, lake.url, shards=3, predict_id="three")
    assert (report.rows, report.processed, report.succeeded, report.failed) == (ROWS, ROWS, ROWS - 2, 2)
    assert report.up_to_date == 0
    (kind,) = report.errors
    assert (kind.kind, kind.rows, sorted(kind.keys)) == ("refused", 2, [(7,), (8,)])
    assert len(server.posts) == ROWS
    assert len(lake.answers("three")) == ROWS
    assert all(runs_of(f"m - rows [{i}/3]") for i in (1, 2, 3))
    again = over_a_table(model, lake.url, predict_id="three")
    assert (again.processed, again.up_to_date) == (0, ROWS)
    with get_client(sync_client=True) as client:
        reports = client.read_artifacts()
    assert [a.key for a in reports if a.key == "three-report"] == ["three-report"] * 2, "one for each call"


def test_what_fails_there_fails_here_with_its_reason(
    model: VllmAPI, lake: Place, server: ScriptedServer
) -> None:
    """Errors of the call, and an exhausted budget with its report, arrive unchanged."""
    with pytest.raises(InvalidCall, match="no column 'txet'; did you mean 'text'"):
        flow(lambda: predict_in_db(model, "txet", "rows", db=lake.url))()
    server.script = lambda asked: refused(400, "never") if asked.body else None
    with pytest.raises(TooManyFailed, match="never") as caught:
        over_a_table(model, lake.url, shards=2)
    assert caught.value.report.failed >= 26, "more than 5 % of the 500 that a share is taken of at least"
    assert caught.value.report.succeeded == 0


def test_what_is_answered_before_a_failure_arrives_with_it(model: VllmAPI, server: ScriptedServer) -> None:
    """If a server goes away, no answer is lost: the error has them in the order of the rows."""
    server.script = lambda asked: refused(503, "away") if asked.prompt == "lost" else None
    impatient = {**model.compute_kwargs, "env": {"VLLM_TASKS_GRACE_PERIOD": "1"}}
    hasty = model.model_copy(update={"compute_kwargs": impatient})
    with pytest.raises(ServerUnavailable) as caught:
        flow(lambda: completions(hasty, ["a", None, "lost"]))()
    assert caught.value.results is not None
    answered, no_prompt, lost = caught.value.results
    assert (answered.text, no_prompt.kind, lost) == (" a!", "prompt", None)


def test_errors_of_rows_have_the_places_of_the_call(model: VllmAPI, server: ScriptedServer) -> None:
    """Errors keep the index of the call, although only rows with a prompt travel."""
    server.script = lambda asked: refused(400, "no") if asked.prompt == "bad" else None
    _, _, bad = flow(lambda: completions(model, [None, "a", "bad"], on_error="return"))()
    assert (bad.kind, bad.index) == ("refused", 2)


def test_a_part_is_done_when_it_has_told_its_outcome() -> None:
    """The outcome counts even if the run dies, or is never heard of again, before its end."""
    report, error = payload.outcome_of("place"), payload.outcome_of_error(EngineFailed("no"))
    crashed = Part("a", {})
    crashed.update(Crashed(), {"outcome": report})
    assert crashed.stage is Stage.DONE
    crashed.update(Crashed(), {"outcome": error})
    assert crashed.stage is Stage.FAILED
    lost = Part("b", {})
    lost.update(Running(), {"outcome": report})
    assert not lost.ended, "its end may come yet"
    lost.since -= END_TIMEOUT
    lost.update(Running(), {"outcome": report})
    assert lost.stage is Stage.DONE


@pytest.mark.long
def test_a_budget_counts_all_shards(model: VllmAPI, lake: Place, server: ScriptedServer) -> None:
    """The failures of all shards together exceed the budget, although no shard alone does."""
    server.script = lambda asked: refused(400, "no") if asked.prompt.endswith("5") else None
    with pytest.raises(TooManyFailed, match="30 of 300 rows failed") as caught:
        over_a_table(model, lake.url, shards=2, max_failed=25)
    assert caught.value.report.processed == ROWS


def test_a_budget_of_tokens_is_divided_over_the_shards(model: VllmAPI, lake: Place) -> None:
    """Each of two shards ends after half of them; the report counts what both have left. A row has 8."""
    report = over_a_table(model, lake.url, shards=2, max_total_tokens=2 * 50 * 8)
    assert report.stopped_by == "max_total_tokens"
    assert 100 <= report.processed == len(lake.answers()) < ROWS
    assert report.remaining == ROWS - report.processed
    assert over_a_table(model, lake.url).processed == report.remaining
    assert exact(lake)


@pytest.mark.long
def test_the_report_counts_what_cancelled_shards_have_committed(
    model: VllmAPI, lake: Place, server: ScriptedServer
) -> None:
    """One shard has too many failures; the other one is cancelled, and commits and reports its rows."""
    here = model.model_copy(update={"compute_kwargs": {}})
    here.predict_in_db("text", "rows", db=lake.url, predict_id="first", shard=(0, 2))
    failing = {f"t{i}" for i in lake.answers("first")}
    completed: list[str] = []
    enough = asyncio.Event()

    async def script(asked: Asked) -> Deed:
        if asked.body is None:
            return None
        if asked.prompt in failing:
            await enough.wait()
            return refused(400, "never")
        if enough.is_set():
            await asyncio.sleep(3600)
        completed.append(asked.prompt)
        if len(completed) == 20:
            enough.set()
        return None

    server.script = script
    with pytest.raises(TooManyFailed, match="never") as caught:
        over_a_table(model, lake.url, shards=2)
    report, rows = caught.value.report, lake.outputs()
    assert {row["output"] for row in rows if row["_error"] is None} == set(map(answer_to, completed))
    assert (report.succeeded, report.processed) == (20, len(rows))
    assert report.unreported_shards == 0


def test_a_validation_runs_on_the_pool_and_is_judged_here(model: VllmAPI, tmp_path: Path) -> None:
    """The values are set on the model, and the gate fails the step here."""
    (tmp_path / "lake").mkdir()
    validation = Validation(
        datasets=[Dataset(identifier="d", raw_data=[{"q": "a", "a": "a!"}, {"q": "b", "a": "c"}])],
        metrics=[Metric(identifier="exact_match", options={"normalize": ["strip"]})],
        key=("q", "a"),
        thresholds={"exact_match": 0.9},
    )

    @flow
    def checks() -> ValidationReport:
        return validate(model, validation, db=str(tmp_path / "lake"))

    with pytest.raises(GateFailed, match="exact_match") as caught:
        checks()
    assert caught.value.report.metric_values == model.metric_values == {"d": {"exact_match": 0.5}}
    (run,) = runs_of("validate m")
    assert run.state_name == "Completed"


# ---------------------------------------------------------------------- deaths


class After:
    """A script that does something after so many rows; later rows complete after it."""

    def __init__(self, rows: int, deed: Callable[[], None]) -> None:
        self.rows, self.deed = rows, deed
        self.seen = 0
        self.done = threading.Event()

    def do(self) -> None:
        try:
            self.deed()
        finally:
            self.done.set()

    async def __call__(self, asked: Asked) -> Deed:
        if asked.body is None:
            return None
        self.seen += 1
        if self.seen == self.rows:
            threading.Thread(target=self.do).start()
        await asyncio.sleep(0.05)
        while self.seen >= self.rows and not self.done.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.05)
        return None


def test_a_killed_flow_run_is_made_again_and_goes_on(
    model: VllmAPI, lake: Place, server: ScriptedServer, workers: Workers
) -> None:
    """One of two shards is killed: the table is complete and exact, and no committed row is sent again."""
    committed: dict[int, Any] = {}

    def kill_one() -> None:
        server.wait_until(lambda: Path(lake.url, "_outputs__m", "_delta_log").is_dir() and lake.answers())
        victim = workers.runs()[0]
        victim.kill()
        victim.wait(10)
        committed.update(lake.answers())

    server.script = After(100, kill_one)
    report = over_a_table(model, lake.url, shards=2, max_chunk_size=10)
    assert exact(lake)
    asked = Counter(asked.prompt for asked in server.posts)
    assert committed
    assert {asked[f"t{i}"] for i in committed} == {1}
    assert max(asked.values()) <= 2
    assert report.rows == ROWS
    states = [state_of(run.id) for i in (1, 2) for run in runs_of(f"m - rows [{i}/2]")[-2:]]
    assert sorted(states).count("Crashed") >= 1


def test_a_machine_that_goes_down_is_noticed(
    model: VllmAPI, lake: Place, server: ScriptedServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker and flow run are killed: the heartbeat timeout reports it, and a new run resumes."""
    monkeypatch.setenv("VLLM_TASKS_HEARTBEAT_TIMEOUT", "5")

    def goes_down() -> None:
        workers.kill()
        workers.start()

    server.script = After(100, goes_down)
    name = "m - rows"
    before = len(runs_of(name))
    over_a_table(model, lake.url, max_chunk_size=10)
    assert exact(lake)
    dead, alive = runs_of(name)[before:]
    assert (state_of(dead.id), state_of(alive.id)) == ("Crashed", "Completed")
    assert "no heartbeat" in str(dead.state and dead.state.message) or state_of(dead.id) == "Crashed"


def test_a_machine_that_goes_down_while_its_run_is_cancelled_is_noticed(
    model: VllmAPI, lake: Place, server: ScriptedServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left to end the run: the step fails at the heartbeat timeout, and the run is cancelled."""
    monkeypatch.setenv("VLLM_TASKS_HEARTBEAT_TIMEOUT", "5")
    before = len(runs_of("m - rows"))

    def goes_down() -> None:
        workers.kill()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(runs_of("m - rows")[before].id, Cancelling())
        workers.start()

    server.script = After(
        100, partial(copy_context().run, goes_down)
    )  # Prefect's settings are in the context
    with pytest.raises(EngineFailed, match="no heartbeat"):
        over_a_table(model, lake.url, max_chunk_size=10)
    (cancelled,) = runs_of("m - rows")[before:]
    assert state_of(cancelled.id) == "Cancelled"


def test_a_step_that_would_ask_again_is_not_made_again(
    model: VllmAPI, lake: Place, server: ScriptedServer, workers: Workers
) -> None:
    """With `overwrite`, rows that a dead run has completed cannot be distinguished, so the step fails."""
    server.script = After(50, lambda: workers.runs()[0].kill())
    with pytest.raises(EngineFailed, match=r"has failed: .*exit"):
        over_a_table(model, lake.url, overwrite=True)


PARENT = """
import sys
from prefect import flow
from vllm_tasks import VllmAPI, predict_in_db

@flow
def parent():
    model = VllmAPI(identifier="cancelled", api_url=sys.argv[1], model="x", max_in_flight=8,
                    compute_kwargs={"work_pool": "tested"})
    predict_in_db(model, "text", "rows", db=sys.argv[2])

parent()
"""


def test_cancelling_the_parent_cancels_the_child(
    lake: Place, server: ScriptedServer, workers: Workers, tmp_path: Path
) -> None:
    """SIGTERM, which is how Prefect cancels, ends the flow run on the pool, which commits what it has."""

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > 30:
            await asyncio.sleep(3600)

    server.script = script
    with running_script(tmp_path, PARENT, server.url, lake.url) as parent:
        server.wait_until(lambda: len(server.posts) == 38)
        time.sleep(1)  # the answers arrive
        parent.send_signal(signal.SIGTERM)
        parent.wait()
    (child,) = runs_of("cancelled - rows")
    server.wait_until(lambda: state_of(child.id) == "Cancelled")
    assert not workers.runs()
    assert len(lake.answers("cancelled")) == 30


# ---------------------------------------------------------------------- where to


def test_wrong_places_are_refused_before_anything_runs(
    model: VllmAPI, lake: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that is not there, hints that it would drop, shards without a pool, shards of a few rows."""

    def refused(words: str, hints: dict[str, Any], **options: Any) -> None:
        other = model.model_copy(update={"compute_kwargs": hints})
        with pytest.raises(InvalidCall, match=words):
            over_a_table(other, lake.url, **options)

    refused("no deployment 'vllm-step/nowhere'.*make pools", {"work_pool": "nowhere"})
    refused("memory, which a work pool of type 'process'", {"work_pool": "tested", "memory": "1Gi"})
    refused("work_queue='gpu' without the work pool", {"work_queue": "gpu"})
    refused("shards=2 are flow runs on a work pool", {}, shards=2)
    refused("leave out limit", {"work_pool": "tested"}, shards=2, limit=5)
    refused("whole number from 1", {"work_pool": "tested"}, shards=0)
    refused("is on the pool 'tested'", {"work_pool": "other", "deployment": "vllm-step/tested"})
    monkeypatch.setenv("VLLM_TASKS_GPU_WORK_POOL", "nowhere")
    local = VllmModel(identifier="local", model_name="/no/model")
    with pytest.raises(InvalidCall, match="no deployment 'vllm-step/nowhere'"):
        over_a_table(local, lake.url)


@pytest.mark.engine
@pytest.mark.long
def test_two_shards_of_a_real_engine_one_killed(tiny_model: Path, workers: Workers, lake: Place) -> None:
    """Each flow run has a vLLM of its own; one is killed with its engine, and the table is complete."""
    model = VllmModel(
        identifier="m",
        model_name=str(tiny_model),
        vllm_kwargs={**TINY_ARGS, "max_num_seqs": 4},
        predict_kwargs={"temperature": 0, "max_tokens": 64, "ignore_eos": True},
        compute_kwargs={"work_pool": workers.name, "num_gpus": 0},
    )
    ended = threading.Event()
    victims: list[Any] = []

    def kill_one_when_it_works() -> None:
        while not ended.wait(0.2):
            if Path(lake.url, "_outputs__m", "_delta_log", "00000000000000000002.json").exists():
                victims.append(workers.runs()[0])
                victims[0].kill()
                return

    killer = threading.Thread(target=kill_one_when_it_works)
    killer.start()
    try:
        report = over_a_table(model, lake.url, shards=2, max_chunk_size=10)
    finally:
        ended.set()
        killer.join()
    assert victims
    assert report.rows == ROWS
    rows = lake.outputs()
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert {row["_completion_tokens"] for row in rows} == {64}
