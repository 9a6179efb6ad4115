"""The Prefect tasks: called, submitted, mapped; names, futures, and rows left alone."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prefect import State, flow, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW, temporary_settings
from prefect.utilities.annotations import quote

from tests.conftest import IN_PREFECT
from tests.scripts import running_script
from tests.servers.scripted_server import Asked, ScriptedServer, answer_to
from tests.tasks.runs import TASKS, Runs, answers
from vllm_tasks import (
    InvalidCall,
    VllmAPI,
    estimate,
    predict,
    predict_batches,
    predict_in_db,
    preview,
    validate,
)
from vllm_tasks._prefect.mapping import RowsTask
from vllm_tasks._prefect.policy import is_temporary
from vllm_tasks.results import Completion
from vllm_tasks.tasks import completions

pytestmark = IN_PREFECT


# ---------------------------------------------------------------------- call, submit, map


def test_tasks_are_called_submitted_and_mapped_in_a_flow(model: VllmAPI) -> None:
    """All three ways give the answers in input order."""

    @flow
    def ways() -> list[Any]:
        called = predict_batches(model, ["a", "b"])
        submitted = predict_batches.submit(model, xs=["c", "d"]).result()
        mapped = predict_batches.map(model, [["e"], ["f", "g"]]).result()
        one = predict(model, "h"), predict.submit(model, "i").result()
        return [called, submitted, mapped, one, predict.map(model, ["j", "k"]).result()]

    called, submitted, mapped, one, each = ways()
    assert (called, submitted) == (answers("a", "b"), answers("c", "d"))
    assert mapped == [answers("e"), answers("f", "g")]
    assert list(one) == answers("h", "i")
    assert each == answers("j", "k")


def test_tasks_work_in_an_asynchronous_flow(model: VllmAPI) -> None:
    """A running event loop is no obstacle."""

    @flow
    async def ways() -> list[Any]:
        called = predict_batches(model, ["a", "b"])
        submitted = predict_batches.submit(model, ["c"]).result()
        mapped = [future.result() for future in predict.map(model, ["d", "e"])]
        return [called, submitted, mapped]

    assert asyncio.run(ways()) == [answers("a", "b"), answers("c"), answers("d", "e")]


def test_tasks_work_outside_of_any_flow(model: VllmAPI) -> None:
    """A task is a function that can be called anywhere."""
    with temporary_settings({PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore"}):
        assert predict_batches(model, ["a"]) == answers("a")
        (completion,) = completions(model, ["a"])
    assert isinstance(completion, Completion)
    assert completion.completion_tokens == 5


def test_many_at_once_share_one_engine(model: VllmAPI, server: ScriptedServer) -> None:
    """A hundred task runs at the same time all get their own answers, through one client."""

    @flow
    def many() -> list[str]:
        return predict.map(model, [str(i) for i in range(100)]).result()

    assert many() == answers(*map(str, range(100)))
    assert Counter(r.path for r in server.requests)["/v1/models"] == 1


@pytest.mark.parametrize("the_task", [predict_batches, completions])
def test_rows_end_with_the_timeout_of_their_task(server: ScriptedServer, the_task: RowsTask) -> None:
    """A submitted task that has timed out sends no more rows, though its thread cannot be interrupted."""

    async def slowly(_: Asked) -> None:
        await asyncio.sleep(0.2)

    server.script = slowly
    model = VllmAPI(identifier="slow", api_url=server.url, max_in_flight=4)

    outcome: list[Any] = []

    @flow
    def timed() -> None:
        task = the_task.with_options(retries=0, timeout_seconds=2)
        submitted = task.submit(model, [f"row {i}" for i in range(400)])
        outcome.append(submitted.result(raise_on_failure=False))

    timed()
    assert isinstance(outcome[0], TimeoutError)
    asked = len(server.posts)
    time.sleep(1)
    assert 0 < asked == len(server.posts) < 400


@pytest.mark.parametrize(("kind", "method"), [(flow, True), (flow, False), (task, True)])
def test_rows_in_a_thread_end_with_the_asynchronous_run_that_waits_for_them(
    server: ScriptedServer, kind: Any, method: bool
) -> None:
    """A coroutine cannot interrupt its thread, and `asyncio.run` would wait for all rows. A hook works."""

    async def slowly(asked: Asked) -> None:
        await asyncio.sleep(0 if asked.prompt == "why" else 0.2)

    server.script = slowly
    model = VllmAPI(identifier="slow", api_url=server.url, max_in_flight=4)
    said: list[str] = []

    def hook(*_: Any) -> None:
        said.append(model.predict("why"))

    @kind(timeout_seconds=2, on_failure=[hook])
    async def timed() -> None:
        rows = [f"row {i}" for i in range(4000)]
        await (
            asyncio.to_thread(model.predict_batches, rows)
            if method
            else asyncio.to_thread(predict_batches, model, rows)
        )

    @flow
    async def job() -> None:
        await timed()

    with pytest.raises(TimeoutError):
        asyncio.run(job())
    assert said == answers("why")
    assert len(server.posts) < 1000


JOB = """
import sys
from prefect import flow, task
from vllm_tasks import VllmAPI, predict_batches
from vllm_tasks.tasks import completions

model = VllmAPI(identifier="m", api_url=sys.argv[1], max_in_flight=8, model="x")

def rows(name):
    return [f"{name} {i}" for i in range(1000)]

@task
def method():
    return model.predict_batches(rows("method"))

@task
def nested():
    return predict_batches(model, rows("nested"))

@flow
def job():
    a, b = predict_batches.submit(model, rows("batches")), completions.submit(model, rows("completions"))
    return [future.result() for future in (a, b, method.submit(), nested.submit())]

job()
"""


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_rows_end_with_the_flow_that_waits_for_them(
    server: ScriptedServer, tmp_path: Path, way: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM, Prefect's way to cancel, end submitted calls, even in the user's own tasks."""

    async def slowly(_: Asked) -> None:
        await asyncio.sleep(0.2)

    server.script = slowly
    with running_script(tmp_path, JOB, server.url) as job:
        ways = {"batches", "completions", "method", "nested"}
        server.wait_until(lambda: {post.prompt.split()[0] for post in server.posts} == ways)
        job.send_signal(way)
        time.sleep(2)
        asked = len(server.posts)
        job.wait()
    assert asked == len(server.posts)


def test_mapping_goes_over_the_rows_alone(model: VllmAPI, server: ScriptedServer) -> None:
    """Neither the model's fields, nor a list of stop words, nor a context is mapped over."""

    @flow
    def mapped() -> Any:
        asked = model.model_copy(update={"prompt": "{context} {input}"})
        by_position = predict_batches.map(asked, [["a"], ["b"]], ["c", "d"], stop=["x", "y", "z"])
        by_name = predict_batches.map(model=asked, xs=[["e"]], context="f", stop=unmapped(["x", "y", "z"]))
        return by_position.result(), by_name.result()

    assert mapped() == ([answers("c\nd a"), answers("c\nd b")], [answers("f e")])
    assert [post.body["stop"] for post in server.posts] == [["x", "y", "z"]] * 3


def test_what_is_no_model_is_refused(model: VllmAPI) -> None:
    """A name, the rows in its place, or the class: by every task, called, submitted or mapped."""
    wrong: Any = "vllm-api/m"

    @flow
    def refused() -> list[State[Any]]:
        calls = [
            predict(wrong, "a", return_state=True),
            predict_batches(["a"], model, return_state=True),  # type: ignore[call-overload]  # refused
            completions(type(model), ["a"], return_state=True),
            predict_in_db(wrong, "text", "rows", return_state=True),
            preview(wrong, "text", "rows", return_state=True),
            estimate(wrong, "text", "rows", return_state=True),
            validate(wrong, return_state=True),
            predict.submit(wrong, "a", return_state=True),
        ]
        return [*calls, *predict.map([wrong], ["a"], return_state=True)]

    for state in refused():
        with pytest.raises(InvalidCall, match="not a VllmAPI or VllmModel"):
            state.result()


def test_a_set_of_rows_is_not_mapped(model: VllmAPI) -> None:
    """It has no order, in which answers would come."""

    @flow
    def mapped() -> Any:
        return predict.map(model, {"a", "b"}).result()

    with pytest.raises(InvalidCall, match="got a set, which has no order"):
        mapped()


# ---------------------------------------------------------------------- names and policy


def test_run_names_say_what_each_task_does() -> None:
    """In the list of task runs, a trial of a table looks unlike the run over it."""
    over = {"model": VllmAPI(identifier="m", api_url="http://x"), "select": "rows"}
    on = {"model": over["model"], "validation": None, "datasets": ["exam"]}
    names = [the_task.task_run_name(over) for the_task in (predict_in_db, preview, estimate)]
    assert names == ["m - rows", "preview m - rows", "estimate m - rows"]
    assert validate.task_run_name(on) == "validate m - exam"
    held = {**over, "select": pa.table({"text": ["private"]})}
    assert predict_in_db.task_run_name(held) == "m - a Table"


def test_run_names_say_model_and_number_of_rows(model: VllmAPI) -> None:
    """Runs have distinct names in the UI, even if the rows come from a future."""
    runs = Runs()
    model.prompt_func = runs

    @task
    def rows() -> list[str]:
        return ["a", "b", "c"]

    @flow
    def named() -> None:
        predict_batches(model, ["a", "b"])
        completions(model, ["a", "b"])
        predict(model, "a")
        predict_batches.submit(model, rows.submit()).result()
        predict_batches.map(model, [["a"] * 5]).result()
        predict_batches(model, (x for x in "a"))

    named()
    assert Counter(runs.names) == {
        "org-model - 2 rows": 4,
        "org-model": 1,
        "org-model - 1 rows": 1,
        "org-model - 3 rows": 3,
        "org-model - 5 rows": 5,
    }


@TASKS
def test_nothing_is_cached_and_options_keep_the_kind(the_task: RowsTask) -> None:
    """No cache key is made of rows, and a task with other options handles rows as before."""
    changed = the_task.with_options(name="other", retries=7, retry_delay_seconds=0)
    assert the_task.cache_policy == changed.cache_policy == NO_CACHE
    assert isinstance(changed, RowsTask)
    assert (changed.name, changed.retries, changed.retry_delay_seconds) == ("other", 7, 0)
    assert changed.task_run_name is the_task.task_run_name
    assert changed.retry_condition_fn is is_temporary
    assert the_task.retries == 2


def test_the_same_call_asks_again(model: VllmAPI, server: ScriptedServer) -> None:
    """A second run sends the same rows again, whatever they are."""
    model.prompt_func = Runs()

    @flow
    def twice() -> None:
        rows = [object()]  # no cache key could be made of this
        predict_batches(model, rows)
        predict_batches(model, rows)

    twice()
    assert len(server.posts) == 2


# ---------------------------------------------------------------------- futures, and rows left alone


def test_rows_that_are_futures_are_resolved(model: VllmAPI) -> None:
    """A future of all rows, rows that are futures or states, and fields of one record."""

    @task
    def word(text: str) -> str:
        return text

    @task
    def words() -> list[str]:
        return ["a", "b"]

    @flow
    def chained() -> list[Any]:
        whole = predict_batches.submit(model, words.submit()).result()
        single = predict_batches.submit(model, [word.submit("c"), "d", word.submit("e")]).result()
        mapped = predict_batches.submit(model, word.map(["f", "g"])).result()
        states = predict_batches(model, [word("h", return_state=True)])
        one = predict.submit(model, word.submit("i")).result()
        asked = model.model_copy(update={"signature": "**kwargs", "prompt": "{a}{b}"})
        record = predict.submit(asked, {"a": word.submit("j"), "b": "k"}).result()
        chain = predict.submit(model, predict.submit(model, "l")).result()
        return [whole, single, mapped, states, one, record, chain]

    assert chained() == [
        answers("a", "b"),
        answers("c", "d", "e"),
        answers("f", "g"),
        answers("h"),
        *answers("i", "jk", answer_to("l")),
    ]


@pytest.mark.parametrize("way", ["future", "by name", "state", "quote", "futures"])
def test_mapping_goes_over_what_a_future_holds(model: VllmAPI, way: str) -> None:
    """The result of an upstream task is resolved and then mapped over, as Prefect does it."""

    @task
    def batches() -> list[list[str]]:
        return [["a"], ["b", "c"]]

    @task
    def batch(texts: str) -> list[str]:
        return list(texts)

    @flow
    def mapped() -> Any:
        if way == "future":
            return predict_batches.map(model, batches.submit()).result()
        if way == "by name":
            return predict_batches.map(model=model, xs=batches.submit()).result()
        if way == "state":
            return predict_batches.map(model, batches(return_state=True)).result()
        if way == "quote":
            return predict_batches.map(model, quote([["a"], ["b", "c"]])).result()
        return predict_batches.map(model, batch.map(["a", "bc"])).result()

    assert mapped() == [answers("a"), answers("b", "c")]


def test_a_model_may_come_from_a_future(model: VllmAPI) -> None:
    """A model that an upstream task makes or loads is resolved."""

    @task
    def load() -> VllmAPI:
        return model

    @flow
    def chained() -> Any:
        return predict_batches.submit(load.submit(), ["a"]).result()

    assert chained() == answers("a")


@dataclass
class Row:
    """A record that counts how often it is read; Prefect would walk its fields."""

    text: str
    reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "text":
            type(self).reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("way", ["call", "submit", "map", "options", "quote"])
def test_rows_are_not_walked(model: VllmAPI, way: str) -> None:
    """Rows reach the model unseen: only `prompt_func` looks into them, once each."""
    model.prompt_func = lambda row: row.text
    rows = [Row(str(i)) for i in range(20)]

    @flow
    def through() -> Any:
        if way == "call":
            return predict_batches(model, rows)
        if way == "submit":
            return predict_batches.submit(model, xs=rows).result()
        if way == "options":
            return predict_batches.with_options(name="x")(model, rows)
        if way == "quote":
            return predict_batches(model, quote(rows))
        return [
            answer for chunk in predict_batches.map(model, [rows[:9], rows[9:]]).result() for answer in chunk
        ]

    Row.reads = 0
    assert through() == answers(*map(str, range(20)))
    assert Row.reads == 20


def test_a_single_record_is_not_walked(model: VllmAPI) -> None:
    """The one record of `predict` is left alone as well."""
    model.prompt_func = lambda row: row.text

    @flow
    def through() -> Any:
        return predict.map(model, [Row("a"), Row("b")]).result()

    Row.reads = 0
    assert through() == answers("a", "b")
    assert Row.reads == 2


def test_a_saved_model_that_was_not_awaited_is_named(model: VllmAPI) -> None:
    """In an asynchronous flow, `VllmAPI.load` returns a coroutine."""

    @flow
    async def job() -> Any:
        return predict_batches(VllmAPI.load("no-such"), ["a"])  # type: ignore[call-overload]  # refused

    with pytest.raises(InvalidCall, match=r"not awaited: .* `await VllmAPI.aload"):
        asyncio.run(job())
