"""The Prefect tasks: retries, caching, and what Prefect's users take for granted."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.cache_policies import INPUTS
from prefect.states import Completed, exception_to_failed_state
from pydantic import BaseModel, create_model

from tests.conftest import IN_PREFECT
from tests.servers.scripted_server import Asked, ScriptedServer, answer_to, refused
from tests.tasks.runs import Runs, answers
from vllm_tasks import InvalidCall, RowError, VllmAPI, predict_batches
from vllm_tasks._prefect.mapping import RowsTask
from vllm_tasks._prefect.policy import is_temporary
from vllm_tasks._prefect.row_retries import over_attempts
from vllm_tasks.errors import EngineFailed, RowErrors, ServerUnavailable
from vllm_tasks.tasks import completions

pytestmark = IN_PREFECT


# ---------------------------------------------------------------------- retries


def at_once(**options: Any) -> RowsTask:
    return predict_batches.with_options(retry_delay_seconds=0, **options)


def test_a_server_that_is_away_is_tried_again(
    model: VllmAPI, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task run waits and tries again; when the server has come back, the call succeeds."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0")
    runs = Runs()
    model.prompt_func = runs
    server.stop()

    def come_back(*_: Any) -> None:
        if runs.seen:
            server.start()

    @flow
    def survive() -> Any:
        return at_once(on_running=[come_back])(model, ["a"])

    assert survive() == answers("a")
    assert runs.attempts == 2


def test_a_server_that_stays_away_fails_the_run_with_its_reason(
    model: VllmAPI, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its retries the task raises `ServerUnavailable`, not a group of errors."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0")
    runs = Runs()
    model.prompt_func = runs
    server.stop()

    @flow
    def despair() -> Any:
        return at_once()(model, ["a", "b", "c"])

    with pytest.raises(ServerUnavailable, match="VLLM_TASKS_GRACE_PERIOD"):
        despair()
    assert runs.attempts == 3


def test_rows_that_fail_are_not_tried_again_by_the_task(model: VllmAPI, server: ScriptedServer) -> None:
    """Rows are the engine's to retry: the run fails once, with all results in its error."""
    server.script = lambda asked: refused(400, "no") if asked.body and asked.prompt == "bad" else None
    runs = Runs()
    model.prompt_func = runs

    @flow
    def partly() -> Any:
        return at_once()(model, ["good", "bad"])

    with pytest.raises(RowErrors) as failed:
        partly()
    assert failed.value.results[0] == answer_to("good")
    assert runs.attempts == 1
    assert len(server.posts) == 2


def test_a_wrong_call_is_not_tried_again(model: VllmAPI, server: ScriptedServer) -> None:
    """A failure that no retry can mend is raised at once, from our own checks and from the server."""
    server.script = lambda asked: refused(404, "no such model") if asked.body else None
    runs = Runs()
    model.prompt_func = runs

    @flow
    def wrong(sampling: dict[str, Any]) -> Any:
        return at_once()(model, ["a"], **sampling)

    with pytest.raises(InvalidCall, match="no such model"):
        wrong({})
    with pytest.raises(InvalidCall, match="temperature"):
        wrong({"temprature": 1})
    assert runs.attempts == 1
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServerUnavailable("x"), True),
        (EngineFailed("died", temporary=True), True),
        (EngineFailed("did not start"), False),
        (InvalidCall("x"), False),
        (RowErrors([], []), False),
        (ConnectionError("another's"), False),
        (ValueError("x"), False),
    ],
)
def test_only_what_may_pass_is_temporary(error: Exception, expected: bool) -> None:
    """Only a server that is away and an engine that died count as temporary."""
    state = asyncio.run(exception_to_failed_state(error))
    assert is_temporary(None, None, state) is expected  # type: ignore[arg-type]


def test_a_success_is_not_temporary() -> None:
    """A state without an error is not retried."""
    assert is_temporary(None, None, Completed(data=1)) is False  # type: ignore[arg-type]


def test_failed_rows_as_values_complete_the_run(model: VllmAPI) -> None:
    """`on_error="return"` reaches the model through the task."""

    @flow
    def partly() -> Any:
        return predict_batches(model, ["a", None], on_error="return")

    answer, error = partly()
    assert answer == answer_to("a")
    assert error.index == 1


# ---------------------------------------------------------------------- what Prefect's users take for granted


@pytest.mark.parametrize("the_task", [predict_batches, completions])
def test_retries_that_a_user_sets_are_for_failed_rows_too(
    model: VllmAPI, server: ScriptedServer, the_task: RowsTask
) -> None:
    """Another attempt sends only the rows that failed; answers stay in their order."""
    times: Counter[str] = Counter()

    def script(asked: Asked) -> Any:
        if not asked.body:
            return None
        times[asked.prompt] += 1
        return refused(400, "no") if times[asked.prompt] < int(asked.prompt) else None

    server.script = script
    rows = ["1", "3", "1 ", "2"]

    @flow
    def ask(retries: int) -> Any:
        return the_task.with_options(retries=retries, retry_delay_seconds=0).with_options(name="n")(
            model, rows
        )

    found = ask(2)
    assert [getattr(each, "text", each) for each in found] == answers(*rows)
    assert times == {"1": 1, "3": 3, "1 ": 1, "2": 2}
    times.clear()
    with pytest.raises(RowErrors) as failed:
        ask(1)
    assert [error.index for error in failed.value.errors] == [1]
    assert getattr(failed.value.results[3], "text", failed.value.results[3]) == answer_to("2")


class Sorted:
    """A sorted column of pandas: it has rows in order, and is indexed by the labels that they had before."""

    def __init__(self, **rows: str) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: int) -> str:
        return self.rows[f"at_{label}"]


def test_another_attempt_sends_the_rows_at_their_positions(model: VllmAPI, server: ScriptedServer) -> None:
    """Not those that a column has under labels of the same numbers."""
    left = ["a"]

    def script(asked: Asked) -> Any:
        return refused(400, "no") if asked.body and asked.prompt in left and not left.clear() else None

    server.script = script

    @flow
    def ask() -> Any:
        return at_once(retries=1)(model, Sorted(at_1="a", at_0="b"))

    assert ask() == answers("a", "b")


def test_another_attempt_has_the_rows_of_an_iterator(
    model: VllmAPI, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would find a generator exhausted, and complete with no row."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0")
    server.stop()
    attempts: list[object] = []

    def come_back(*_: Any) -> None:
        attempts.append(_)
        if len(attempts) > 1:
            server.start()

    @flow
    def ask() -> Any:
        return at_once(on_running=[come_back])(model, (x for x in "ab"))

    assert ask() == answers("a", "b")


def test_an_attempt_that_finds_no_server_forgets_no_answer() -> None:
    """The attempt after it sends only the rows that failed before."""
    asked: list[list[str]] = []

    def ask(xs: Sequence[Any], _: Any) -> list[Any]:
        asked.append(list(xs))
        if len(asked) == 1:
            error = RowError("refused", "no", index=1)
            raise RowErrors([error], ["A", error])
        if len(asked) == 2:
            raise ServerUnavailable("away")
        return [x.upper() for x in xs]

    trying = RowsTask(
        lambda xs: over_attempts(ask, xs, "raise"), name="trying", retry_condition_fn=is_temporary
    )

    @flow
    def run() -> Any:
        return trying.with_options(retries=2, retry_delay_seconds=0)(["a", "b"])

    assert run() == ["A", "B"]
    assert asked == [["a", "b"], ["b"], ["b"]]


def test_an_equal_model_hits_the_cache_of_inputs(server: ScriptedServer, tmp_path: Path) -> None:
    """The cache depends on the model's fields, not its `uuid`; another function or database misses it."""

    def made(**fields: Any) -> VllmAPI:
        return VllmAPI(identifier="m", api_url=server.url, **fields)

    kept = predict_batches.with_options(cache_policy=INPUTS, persist_result=True)
    one, other = tmp_path / "one", tmp_path / "other"

    @flow
    def ask(model: VllmAPI) -> Any:
        return kept(model, ["a", "b"])

    asked = []
    for fields in (
        *({}, {}, {"db": str(one)}, {"db": str(other)}, {"db": str(one)}),
        *({"prompt_func": lambda x: f"1{x}"}, {"prompt_func": lambda x: f"2{x}"}),
        *({"api_key": "one"}, {"api_key": "two"}, {"max_batch_size": 1}),
        *({"headers": {"X": "one"}}, {"headers": {"X": "two"}}, {"headers": {"X": "two"}}),
    ):
        before = len(server.posts)
        ask(made(**fields))
        asked.append(len(server.posts) - before)
    assert asked == [2, 0, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2, 0]


class Ticket(BaseModel):
    title: str


def test_a_changed_class_of_answers_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields and checks decide what an answer is, as the code of a function does."""
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["tests"]')
    path = f"{Ticket.__module__}.{Ticket.__name__}"
    model = VllmAPI(identifier="m", api_url="http://127.0.0.1:9", output_schema=path)
    before = model.identity()
    assert model.identity() == before
    changed = create_model("Ticket", __module__=__name__, title=(int, ...))
    monkeypatch.setattr(sys.modules[__name__], "Ticket", changed)
    assert model.identity() != before


def test_a_thread_keeps_the_loop_of_an_asynchronous_flow_free(model: VllmAPI, server: ScriptedServer) -> None:
    """In the documented way, `asyncio.to_thread`, the task is a task run of the flow as usual."""
    runs = Runs()
    model.prompt_func = runs

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(1)

    server.script = script

    @flow
    async def ask() -> tuple[Any, int]:
        asking = asyncio.create_task(asyncio.to_thread(predict_batches, model, ["a"]))
        turns = 0
        while not asking.done():
            turns += 1
            await asyncio.sleep(0.01)
        return await asking, turns

    found, turns = asyncio.run(ask())
    assert found == answers("a")
    assert turns > 10
    assert runs.names == ["org-model - 1 rows"]
