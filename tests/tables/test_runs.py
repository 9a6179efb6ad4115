"""`predict_in_db` while it runs: when rows are committed, and when it stops."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.eventually import eventually
from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, answer_to, refused
from tests.tables.runs import Sent, ask, changed, says, there
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.errors import ServerUnavailable, TooManyFailed
from vllm_tasks.tables import Log
from vllm_tasks.tables.commit_policy import CommitPolicy

# ---------------------------------------------------------------------- streaming


def test_a_long_row_holds_up_no_commit(
    model: VllmAPI, place: Place, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one row is still in flight, the others are committed when their time is up."""
    monkeypatch.setenv("VLLM_TASKS_COMMIT_SECONDS", "0.3")
    place.fill_texts("slow", *(f"t{i}" for i in range(50)))
    committed = asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.body and asked.prompt == "slow":
            await committed.wait()

    server.script = script
    job = threading.Thread(target=ask, args=[model])
    job.start()
    try:
        server.wait_until(lambda: len(there(place)) == 50)
    finally:
        server._loop.call_soon_threadsafe(committed.set)
        job.join()
    assert len(place.answers()) == 51


def test_two_runs_that_begin_the_same_outputs_at_once(server: ScriptedServer, place: Place) -> None:
    """Neither finds outputs of the other's source at its start; the second commit is refused then."""
    place.fill_texts("a", "b")
    both = asyncio.Barrier(4)

    async def script(asked: Asked) -> None:
        if asked.body:
            await both.wait()

    server.script = script
    ended: dict[str, Any] = {}

    def run(select: str) -> None:
        try:
            with VllmAPI(identifier="m", api_url=server.url, model="m", chat=False) as model:
                ended[select] = model.predict_in_db("text", select, db=place.url)
        except InvalidCall as error:
            ended[select] = error

    selects = "rows", "SELECT id, upper(text) AS text FROM rows"
    jobs = [threading.Thread(target=run, args=[select]) for select in selects]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    (won,) = [select for select in selects if not isinstance(ended[select], InvalidCall)]
    (lost,) = [end for end in ended.values() if isinstance(end, InvalidCall)]
    assert "same_source=True" in str(lost)
    texts = ["a", "b"] if won == "rows" else ["A", "B"]
    assert [row["output"] for row in place.outputs()] == [answer_to(text) for text in texts]


def test_a_cancelled_coroutine_stops_the_call_that_it_waits_for(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """The call blocks the event loop, so Ctrl-C under `asyncio.run`, or a timeout, cannot be raised in it."""
    place.fill_texts("a", "b")
    task: asyncio.Task[None] | None = None

    async def script(asked: Asked) -> None:
        if asked.body:
            assert task
            task.cancel()
            await asyncio.sleep(3600)

    async def work() -> None:
        nonlocal task
        task = asyncio.current_task()
        ask(model)

    server.script = script
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    assert there(place) == []


def test_the_first_groups_are_small() -> None:
    """In a young run no row waits longer for its commit than 5 s or a tenth of the run's time so far."""
    commit_policy = CommitPolicy.of(None, commit_rows=512, commit_seconds=30.0)

    def closes(age: float, elapsed: float, *, redo: bool = False) -> bool:
        return commit_policy.is_due(10, age, age, elapsed, redo=redo)

    assert [closes(5, 5), closes(6, 60), closes(30, 10_000)] == [True] * 3
    assert [closes(4.9, 5), closes(5.9, 60), closes(29.9, 10_000)] == [False] * 3
    assert not closes(29.9, 60, redo=True), "a lake copies the files of rows that are redone"


def test_the_engine_stays_full_across_groups(server: ScriptedServer, place: Place) -> None:
    """Rows of later groups are in flight while earlier ones are committed, within the limit."""
    place.fill_texts(*(f"t{i}" for i in range(400)))

    async def script(asked: Asked) -> None:
        await asyncio.sleep(0.01)

    server.script = script
    with VllmAPI(
        identifier="m", api_url=server.url, db=place.db, max_in_flight=16, max_batch_size=1
    ) as model:
        report = ask(model, max_chunk_size=20)
    assert report.commits >= 20
    assert server.peak == 16


def test_groups_have_the_size_asked_for(model: VllmAPI, place: Place) -> None:
    """`max_chunk_size` is the number of rows of a commit."""
    place.fill_texts(*(f"t{i}" for i in range(100)))
    assert ask(model, max_chunk_size=30).commits == 4


# ---------------------------------------------------------------------- the end


def test_rows_that_become_no_prompt_do_not_look_hopeless(model: VllmAPI, place: Place) -> None:
    """They fail before any completion, and do not count against the rows that are sent."""
    place.fill_texts(*(None if i % 5 == 0 else f"t{i}" for i in range(500)))
    report = ask(model, max_failed=0.5)
    assert (report.succeeded, report.failed) == (400, 100)


def test_an_interrupt_after_a_commit_does_not_repeat_it(model: VllmAPI, place: Place) -> None:
    """An interrupt at the end of a commit that is retried leaves each key there once."""

    class Interrupted(Log):
        def commit(self, name: str, work: Callable[[], None]) -> None:
            work()
            raise KeyboardInterrupt

    place.fill_texts(*(f"t{i}" for i in range(100)))
    with pytest.raises(KeyboardInterrupt):
        ask(model, max_chunk_size=10, display=Interrupted())
    assert len(place.answers()) >= 10
    ask(model)
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(100)}


def test_an_interrupt_while_the_reader_starts_ends_it(
    model: VllmAPI, place: Place, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may be raised when the reader runs already, and nobody waits for its rows yet."""
    place.fill_texts(*(f"t{i}" for i in range(2000)))  # more than are in flight at once
    starts, readers = threading.Thread.start, list[threading.Thread]()

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(3600)

    def interrupted(thread: threading.Thread) -> None:
        starts(thread)
        if thread.name == "vllm-tasks-reader":
            readers.append(thread)
            raise KeyboardInterrupt

    server.script = script
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(model)
    (reader,) = readers
    assert eventually(lambda: not reader.is_alive())
    assert there(place) == []


def test_a_hopeless_run_stops_at_once(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """If the first rows all fail alike, no more rows are sent; the failed ones are committed."""
    place.fill_texts(*(f"t{i}" for i in range(5000)))
    server.script = lambda asked: refused(400, "never") if asked.body else None
    with pytest.raises(TooManyFailed, match=r"all failed alike.*retry_failed=True") as raised:
        ask(model, max_failed=0.5)
    report = raised.value.report
    assert report.succeeded == 0
    assert 50 <= report.failed == len(place.outputs()) < 5000
    assert report.errors[0].kind == "refused"


@pytest.mark.parametrize(
    ("max_failed", "fails"), [(0.05, True), (3, True), (4, False), (0.2, False), (None, False)]
)
def test_a_budget_is_a_share_or_a_count(
    model: VllmAPI, place: Place, server: ScriptedServer, max_failed: float | int | None, fails: bool
) -> None:
    """4 failed rows of 40 are within a fifth and a count of 4, and beyond a twentieth and a count of 3."""
    place.fill_texts(*(f"t{i}" for i in range(40)))
    bad = {"t3", "t13", "t23", "t33"}
    server.script = lambda asked: refused(400, "no") if asked.body and asked.prompt in bad else None
    if fails:
        with pytest.raises(TooManyFailed, match=r"4 of \d+ rows failed.*4 of them refused"):
            ask(model, max_failed=max_failed)
    else:
        ask(model, max_failed=max_failed)
    assert sum(row["_error"] is not None for row in place.outputs()) == 4


def test_a_server_that_goes_away_is_waited_for(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A server that stops and comes back during a run costs only time."""
    place.fill_texts(*(f"t{i}" for i in range(300)))
    stopped = threading.Event()

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(0.02)

    def restart() -> None:
        server.wait_until(lambda: len(server.posts) > 100)
        server.stop()
        stopped.set()
        server.start()

    server.script = script
    restarting = threading.Thread(target=restart)
    restarting.start()
    patient = changed(model, retries=5, max_in_flight=32)
    with patient:
        ask(patient)
    restarting.join()
    assert stopped.is_set()
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(300)}


def test_a_server_that_stays_away_keeps_what_is_finished(
    place: Place, server: ScriptedServer, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails after the grace period with completed rows committed; the next one sends the rest."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    place.fill_texts(*(f"t{i}" for i in range(100)))
    allowed = 40

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > allowed:
            await asyncio.sleep(3600)

    def stop() -> None:
        server.wait_until(lambda: len(server.posts) >= allowed + 8 and server.open == 8)
        time.sleep(0.2)  # the last answers arrive
        server.stop()

    server.script = script
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, max_in_flight=8, model="named") as model:
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(ServerUnavailable):
            ask(model)
        stopping.join()
        assert len(place.answers()) == allowed
        sent()
        server.script = lambda _: None
        server.start()
        assert ask(model).processed == 100 - allowed
    assert len(sent()) == 100 - allowed
    assert len(place.answers()) == 100


def no_booms(x: str) -> str:
    if x.startswith("boom"):
        raise ValueError("boom")
    return x


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_keys_that_no_table_holds_keep_what_is_finished(model: VllmAPI, place: Place) -> None:
    """Rows whose keys the outputs cannot hold end the run, and every other completed row is kept."""
    good = {"boom 1", "boom 2", "boom 3"}
    place.fill_texts(*good, os.urandom(4000).hex(), os.urandom(4000).hex())
    with pytest.raises(InvalidCall, match="can have no output"):
        ask(changed(model, prompt_func=booms), primary_id="text")
    assert {row["text"] for row in place.db.outputs("m").to_pylist()} == good


def booms(x: str) -> str:
    raise ValueError(x)


POISON = 20
"""Rows of each kind: 1 % of 2,000."""


STAGES = {
    "unreadable": "prompt: prompt_func raised AttributeError",  # NULL
    "template": "prompt: prompt_func raised ValueError: boom",
    "long": "too_long: ",
    "refused": "refused: ",
    "late": "timeout: ",
    "undecodable": "output: ",
}


def test_poison_at_every_stage_fails_its_rows_alone(place: Place, server: ScriptedServer) -> None:
    """2,000 rows with 1 % poison at each stage: the job completes, each bad row has the error of its
    stage, and `retry_failed` sends exactly those."""
    texts = [f"t{i}" for i in range(2000)]
    expected = {}
    for n, (stage, words) in enumerate(STAGES.items()):
        for i in range(n, 2000, 2000 // POISON):
            texts[i] = None if stage == "unreadable" else f"{'boom' if stage == 'template' else stage} {i}"  # type: ignore[call-overload]
            expected[i] = words
    place.fill_texts(*texts)
    healed = False

    async def script(asked: Asked) -> Reply | None:
        stage = asked.prompt.split()[0] if asked.body else ""
        if stage == "late" and not healed:
            await asyncio.sleep(3600)
        if stage == "long" and not healed:
            return refused(400, "This model's maximum context length is 10 tokens")
        if stage == "refused" and not healed:
            return refused(400, "not with me")
        return says("none" if stage == "undecodable" and not healed else "7")(asked)

    server.script = script
    fields = {"identifier": "m", "api_url": server.url, "db": place.db, "timeout": 2, "retries": 0}
    with VllmAPI(**fields, max_in_flight=64, prompt_func=no_booms, datatype="int") as model:
        report = model.predict_in_db("text", "rows", max_failed=0.1)
        assert (report.succeeded, report.failed) == (2000 - len(expected), len(expected))
        rows = {row["id"]: row for row in place.outputs()}
        assert len(rows) == 2000
        for i, row in rows.items():
            assert row["output"] == (None if i in expected else 7)
            assert (row["_error"] or "").startswith(expected.get(i, "")), row
        healed = True
        before = len(server.posts)
        report = model.predict_in_db("text", "rows", retry_failed=True, max_failed=None)
    sent = {int(asked.prompt.split()[1]) for asked in server.posts[before:]}
    assert sent == {i for i, words in expected.items() if not words.startswith("prompt")}
    assert report.processed == len(expected)
    assert {i for i, output in place.answers().items() if output is None} == expected.keys() - sent
