"""Users and deaths of an engine, against a scripted host that starts in milliseconds."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.eventually import eventually
from tests.places import Place
from vllm_tasks import InvalidCall, RowError, VllmModel
from vllm_tasks.engines import loop, session, sharing
from vllm_tasks.engines.local import adapters, gpus, process
from vllm_tasks.errors import EngineFailed

Make = Any


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def make(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes models whose engine is the scripted host, and closes it at the end."""
    monkeypatch.setattr(process, "HOST", Path(__file__).parents[1] / "servers/scripted_host.py")
    made: list[VllmModel] = []

    def model(**arguments: Any) -> VllmModel:
        kwargs = {"log": str(log), **arguments}
        # Without it the engine would be started to ask for its template, which is a call before the call.
        made.append(VllmModel(identifier="scripted", model_name="m", vllm_kwargs=kwargs, chat=False))
        return made[-1]

    yield model
    for each in made:
        each.close()
    assert not hosts()


def hosts() -> list[psutil.Process]:
    children = psutil.Process().children()
    alive = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if any(part.endswith("scripted_host.py") for part in p.cmdline())]


def starts(log: Path) -> int:
    return log.read_text().count("start\n")


def asked(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line not in ("start", "end")]


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    """The thread, and later the result or exception of `work`."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001 - the test looks at whatever it was
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def wait_for_start(log: Path) -> None:
    assert eventually(log.exists)


def interrupt(work: Callable[[], Any], log: Path, line: str = "start", times: int = 1) -> None:
    """Ctrl-C during `work`, when the engine's process has logged `line` so many times."""
    main = threading.main_thread().ident
    assert main is not None

    def then() -> None:
        wait_for_start(log)
        assert eventually(lambda: log.read_text().splitlines().count(line) == times)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=then)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        work()
    thread.join()


def test_equal_models_share_one_engine_and_the_last_to_leave_ends_it(make: Make, log: Path) -> None:
    """Two models of one configuration start one engine; it lives until both have released it."""
    first, second = make(), make()
    with first, second, second:
        assert first.predict("a") == second.predict("a") == "a"
        first.close()
        assert len(hosts()) == 1
    assert starts(log) == 1
    assert not hosts()


def test_copies_of_one_saved_model_hold_apart(make: Make, log: Path) -> None:
    """Two loads of one block, with one uuid, do not release each other's engine."""
    first = make()
    second = first.model_copy()
    with second:
        first.init().init()
        first.close()
        assert len(hosts()) == 1
        second.predict("a")
    assert starts(log) == 1


def test_used_engine_stays_warm(make: Make, log: Path) -> None:
    """An engine that was only used is there for the next call."""
    make().predict("a")
    assert make().predict("b") == "b"
    assert starts(log) == 1
    assert len(hosts()) == 1


def test_close_of_another_does_not_end_a_start(make: Make, log: Path) -> None:
    """While one thread's call starts the engine, another model's close leaves it alone."""
    caller, other = make(start=1), make(start=1)
    thread, outcome = in_thread(lambda: caller.predict("a"))
    wait_for_start(log)
    other.close()
    thread.join()
    assert outcome == ["a"]
    assert starts(log) == 1


def test_closing_engine_is_gone_before_its_successor_starts(make: Make, log: Path) -> None:
    """A call that comes while the engine closes gets a new one, never a second beside it."""
    model = make()
    with model:
        pass
    assert not hosts()
    assert model.predict("a") == "a"
    assert len(hosts()) == 1
    assert starts(log) == 2


def test_failed_start_gives_the_cause_in_the_log(make: Make, log: Path) -> None:
    """An error that only points to the log is replaced by the logged one; the next call starts again."""
    model = make(refuse="no room")
    for _ in range(2):
        with pytest.raises(EngineFailed, match="ValueError: no room") as caught:
            model.predict("a")
        assert not caught.value.temporary
    assert starts(log) == 2


def test_close_ends_a_start_that_was_interrupted(make: Make, log: Path) -> None:
    """An engine whose first caller left while it loaded does not come to life after `close()`."""
    model = make(start=60)
    interrupt(model.init, log)
    assert len(hosts()) == 1
    model.close()
    assert not hosts()


def test_start_takes_no_longer_than_it_may(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start is ended after its timeout, however rarely it reports progress; nothing of it is left."""
    monkeypatch.setenv("VLLM_TASKS_ENGINE_START_TIMEOUT", "1")
    with pytest.raises(EngineFailed, match=r"within 1 s \(VLLM_TASKS_ENGINE_START_TIMEOUT\)"):
        make(start=60).predict("a")
    assert not hosts()


def test_failure_of_an_interrupted_start_is_nobodys(make: Make, log: Path) -> None:
    """A start that fails after its caller has left is forgotten; the next call starts again."""
    model = make(start=0.5, refuse="no room")
    interrupt(model.init, log)

    async def end_of_starts() -> None:
        starts = [shared.started for shared in sharing._shared.values() if shared.started]
        await asyncio.gather(*starts, return_exceptions=True)

    loop.run(end_of_starts())
    with pytest.raises(EngineFailed):
        model.predict("a")
    assert starts(log) == 2


def test_engine_for_which_others_made_room_stays_warm(
    make: Make, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the engines whose GPU it needs are closed, not the one that starts, even with two calls."""
    monkeypatch.setattr(gpus.free_devices, "__defaults__", (tmp_path / "gpus",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")
    make(log=str(tmp_path / "other")).predict("a")
    for _ in range(2):
        make().predict("b")
    assert starts(log) == 1
    assert len(hosts()) == 1


def test_rows_of_a_dead_engine_are_asked_once_more(make: Make, log: Path) -> None:
    """After a death the open rows, and those that came meanwhile, are sent once each."""
    model = make(start=0.5)
    model.init()
    thread, outcome = in_thread(lambda: model.predict_batches(["a", "die", "z"], max_tokens=1))
    assert eventually(lambda: starts(log) == 2)
    late = model.predict_batches(["late 1", "late 2"])  # the second engine is still starting
    thread.join()
    assert outcome == [["a", "die", "z"]]
    assert late == ["late 1", "late 2"]
    assert asked(log).count("late 1") == asked(log).count("late 2") == 1
    assert asked(log).count("a") == 1
    assert asked(log).count("die") == 2


def test_row_that_kills_the_engine_is_given_up_when_it_was_alone(make: Make, log: Path) -> None:
    """A row that kills every engine becomes an error, and the others complete."""
    results = make().predict_batches(["a", "die always", "z"], on_error="return", temperature=0)
    assert results[0] == "a"
    assert isinstance(results[1], RowError)
    assert results[1].kind == "engine"
    assert results[1].retryable
    assert asked(log).count("die always") == 3
    assert make().predict("again") == "again"


def test_only_rows_that_kill_are_lost(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in flight together, those that kill or hang the engine are found one by one, each time."""
    monkeypatch.setenv("VLLM_TASKS_ENGINE_TIMEOUT", "1")
    model = make()
    rows = ["die always"] * 3 + ["hang always"] + [f"row {i}" for i in range(60)]
    results = model.predict_batches(rows, on_error="return", temperature=1)
    assert [r.index for r in results if isinstance(r, RowError)] == [0, 1, 2, 3]
    assert results[4:] == rows[4:]
    for _ in range(3):
        (again,) = model.predict_batches(["die always"], on_error="return")
        assert isinstance(again, RowError)
    assert model.predict("well") == "well"


def test_table_has_an_error_for_each_bad_row_and_no_other(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,000 rows with 3 that kill, 2 that hang and 5 that are refused, 990 complete; `retry_failed`
    sends the bad ones again, and no good row is lost then.
    """
    monkeypatch.setenv("VLLM_TASKS_ENGINE_TIMEOUT", "1")
    bad = ["die always"] * 3 + ["hang always"] * 2 + ["refuse"] * 5
    rows = [bad[i // 100] if i % 100 == 50 else f"row {i}" for i in range(1000)]
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*rows)
    with make() as model:
        report = model.predict_in_db("text", "rows", db=place.db, max_failed=None)
        assert (report.succeeded, report.failed) == (990, 10)
        assert {e.kind: e.rows for e in report.errors} == {"engine": 5, "refused": 5}
        again = model.predict_in_db("text", "rows", db=place.db, max_failed=None, retry_failed=True)
        assert (again.succeeded, again.failed) == (0, 10)
    answers = place.answers("scripted")
    assert [i for i in range(1000) if answers[i] != rows[i]] == [100 * i + 50 for i in range(10)]


def test_call_whose_rows_all_kill_costs_no_other_call_a_row(make: Make) -> None:
    """The call fails, and the rows of another call on the same engine complete."""
    model = make(pause=0.02)
    model.init()
    rows = [f"row {i}" for i in range(60)]
    other, outcome = in_thread(lambda: model.predict_batches(rows, temperature=1))
    with pytest.raises(EngineFailed, match="without completing a row of this call"):
        model.predict_batches(["die always"] * 40, temperature=1)
    other.join()
    assert outcome == [rows]


def test_row_is_not_blamed_for_one_that_was_cancelled_before_it(make: Make, log: Path) -> None:
    """A suspect whose call is interrupted may still kill the engine, when the next one is there alone."""
    model = make(pause=1)
    model.init()

    def innocent() -> Any:
        assert eventually(lambda: "die always" in asked(log))
        return model.predict_batches(["b"], on_error="return", temperature=1)

    thread, outcome = in_thread(innocent)
    interrupt(lambda: model.predict("die always"), log, "die always", times=3)
    thread.join()
    assert outcome == [["b"]]
    assert starts(log) == 4


def test_wrong_call_is_refused_alone(make: Make, log: Path) -> None:
    """An error that the engine finds in a call fails that call alone, and the engine survives."""
    model = make(pause=0.02)
    model.init()
    rows = [f"row {i}" for i in range(40)]
    other, outcome = in_thread(lambda: model.predict_batches(rows, temperature=1))
    with pytest.raises(InvalidCall, match="there is no adapter"):
        model.predict_batches(["no adapter"] * 8, on_error="return", temperature=1)
    other.join()
    assert outcome == [rows]
    assert starts(log) == 1


def test_what_is_no_json_fails_its_own_call(make: Make, log: Path) -> None:
    """This also holds while the engine restarts, when the rows of all calls travel together."""
    model = make(start=0.5)
    model.init()
    dying, of_dying = in_thread(lambda: model.predict_batches(["a", "die"], temperature=1))
    assert eventually(lambda: starts(log) == 2)
    with pytest.raises(InvalidCall, match=r"stop=\{'x'\} cannot be sent as JSON"):
        model.predict_batches(["b"], stop={"x"})
    assert model.predict("c") == "c"
    dying.join()
    assert of_dying == [["a", "die"]]
    assert starts(log) == 2


def test_engine_that_hangs_is_started_again(
    make: Make, log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine without progress is ended after the site's timeout, with a log line; an idle one is not."""
    monkeypatch.setenv("VLLM_TASKS_ENGINE_TIMEOUT", "1")
    with make() as model:
        time.sleep(1.5)
        assert model.predict_batches(["hang", "z"], temperature=1) == ["hang", "z"]
    assert starts(log) == 2
    assert "hung: no progress with any of 2 rows for 1 s (VLLM_TASKS_ENGINE_TIMEOUT)" in caplog.text


@pytest.mark.parametrize(
    ("last", "why"),
    [("crash", "ValueError: crash"), ("die always", "SIGKILL (often the kernel, out of memory)")],
)
def test_cause_of_a_death_is_the_newest(
    make: Make, last: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The cause is a signal or the last printed error, not an earlier one that was overcome."""
    make().predict_batches(["trouble"])
    make().predict_batches([last], on_error="return")
    deaths = [r.getMessage() for r in caplog.records if "died" in r.getMessage()]
    assert deaths
    assert why in deaths[0]
    assert "trouble" not in deaths[0].partition("last words")[0]


def test_close_beside_an_engine_that_takes_long_to_end(make: Make, log: Path) -> None:
    """Its process has ended when `close()` returns, although it had time to end in order."""
    model = make().init()
    interrupt(lambda: model.predict("linger"), log, "linger")
    time.sleep(0.5)
    model.close()
    assert not hosts()


def test_host_that_is_gone_while_it_is_written_to_is_ended(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds on the loop of Ray's actors, where its closed socket takes no more orders."""
    uvloop = pytest.importorskip("uvloop")
    monkeypatch.setattr(process, "HOST", Path(__file__).parents[1] / "servers/scripted_host.py")

    async def life() -> str:
        host, _ = await process.HostProcess.launch({"model": "m", "log": str(log)}, 30)
        for prompt in ("die always", *("x" * 20_000 for _ in range(200))):
            host.write({"chunk": [[0, prompt]], "sampling": {}, "task": "generate"})
        assert await host.read() == {}
        await host.end()
        return host.why("")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert "SIGKILL" in runner.run(life())


def test_init_after_a_failure_starts_anew(make: Make, log: Path) -> None:
    """This also holds for a model that held the engine, and if no call has met the failure."""
    model = make(lives=1).init()
    hosts()[0].kill()
    shared = sharing._shared[model.engine_config()]
    assert eventually(lambda: shared.engine is not None and shared.engine.has_failed)
    log.unlink()
    model.init()
    assert starts(log) == 1
    assert model.predict("a") == "a"
    assert starts(log) == 1


def test_engine_that_ran_before_may_run_again(make: Make) -> None:
    """A failed restart is a temporary failure; a failed first start is not."""
    with pytest.raises(EngineFailed, match="no more lives") as caught:
        make(lives=1).predict("die")
    assert caught.value.temporary


def test_engine_that_only_dies_fails_the_call(make: Make) -> None:
    """Engines that die in a row without a completion end the call, as a temporary failure."""
    rows = ["die always"] * 40
    with pytest.raises(EngineFailed, match="died 6 times without completing") as caught:
        make().predict_batches(rows, on_error="return")
    assert caught.value.temporary
    assert caught.value.results is not None
    assert len(caught.value.results) == 40
    assert any(isinstance(result, RowError) for result in caught.value.results)
    assert None in caught.value.results


def test_long_line_of_the_log_stops_nothing(make: Make) -> None:
    """A line of megabytes is read and dropped, and the engine does not block on a full pipe."""
    assert make().predict_batches(["shout", "shout", "a"], max_tokens=1) == ["shout", "shout", "a"]


def test_rows_without_a_prompt_start_no_engine(make: Make, log: Path) -> None:
    """Without rows to process, no engine is started."""
    assert make().predict_batches([]) == []
    (error,) = make().predict_batches([None], on_error="return")
    assert isinstance(error, RowError)
    assert not log.exists()


def test_garbage_collection_is_as_before_after_calls(make: Make) -> None:
    """Calls, also failing and overlapping ones, leave the collector's thresholds as they found them."""
    before = gc.get_threshold()
    slow, _ = in_thread(lambda: make(start=0.5).predict("a"))
    make().predict_batches(["a", "die always"], on_error="return")
    with pytest.raises(EngineFailed):
        make(refuse="no room").predict("a")
    slow.join()
    assert gc.get_threshold() == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12
def test_close_ends_an_engine_in_order_where_a_forked_child_lives(make: Make, log: Path) -> None:
    """The child has a copy of the socket whose end stops the engine's process."""
    model = make().init()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    model.close()
    assert log.read_text().endswith("end\n"), "it was killed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12
def test_fork_does_not_cut_the_parent_off(make: Make, log: Path) -> None:
    """After a fork whose child collects its garbage, the parent's engine still works."""
    model = make()
    model.predict("before")
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    thread, outcome = in_thread(lambda: model.predict("after"))
    thread.join()
    assert outcome == ["after"]
    assert starts(log) == 1


def test_adapter_that_is_written_to_while_it_is_copied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the copy might mix files of both versions for the engine's life."""
    monkeypatch.setenv(session.SOCKETS, str(tmp_path))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS[0]):
        (folder / name).write_text("{}")
    found = adapters.stamps(str(folder))
    assert (adapters.copied(folder, 1, str(folder), found) / adapters.ADAPTER_CONFIG).read_text() == "{}"
    (folder / adapters.ADAPTER_CONFIG).write_text("{...}")
    with pytest.raises(adapters.Unusable, match="written to while it was copied"):
        adapters.copied(folder, 2, str(folder), found)
