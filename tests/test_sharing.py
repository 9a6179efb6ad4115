"""Who holds an engine, and what its deaths cost: against a scripted host, in milliseconds a life."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_tasks import EngineFailed, RowError, VllmModel, loop, sharing
from vllm_tasks.engines import gpus, process

Make = Any


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def make(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes models whose engine is the scripted host, and closes it at the end."""
    monkeypatch.setattr(process, "HOST", Path(__file__).with_name("scripted_host.py"))
    made: list[VllmModel] = []

    def model(**arguments: Any) -> VllmModel:
        kwargs = {"log": str(log), **arguments}
        made.append(VllmModel(identifier="scripted", model_name="m", vllm_kwargs=kwargs))
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
    return [line for line in log.read_text().splitlines() if line != "start"]


def in_thread(work: Any) -> tuple[threading.Thread, list[Any]]:
    """The thread and, when it has ended, what `work` returned or raised."""
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
    deadline = time.monotonic() + 30
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt_while_it_starts(model: VllmModel, log: Path) -> None:
    """Ctrl-C in `init()`, when the engine's process is there and its model still loads."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_for_start(log)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        model.init()
    thread.join()


def test_equal_models_share_one_engine_and_the_last_to_leave_ends_it(make: Make, log: Path) -> None:
    """Two models of one configuration start one engine; it lives until both have let it go."""
    first, second = make(), make()
    with first, second, second:
        assert first.predict("a") == second.predict("a") == "a"
        first.close()
        assert len(hosts()) == 1
    assert starts(log) == 1
    assert not hosts()


def test_copies_of_one_saved_model_hold_apart(make: Make, log: Path) -> None:
    """Two loads of one block, with one uuid, do not let go of each other's hold."""
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
    """An error that only points at the log is replaced by the one in the log; the next call tries anew."""
    model = make(refuse="no room")
    for _ in range(2):
        with pytest.raises(EngineFailed, match="ValueError: no room") as caught:
            model.predict("a")
        assert not caught.value.temporary
    assert starts(log) == 2


def test_close_ends_a_start_that_was_interrupted(make: Make, log: Path) -> None:
    """An engine whose first caller left while it loaded does not come to life after `close()`."""
    model = make(start=60)
    interrupt_while_it_starts(model, log)
    assert len(hosts()) == 1
    model.close()
    assert not hosts()


def test_failure_of_an_interrupted_start_is_nobodys(make: Make, log: Path) -> None:
    """A start that fails after its caller has left is forgotten; the next call tries anew."""
    model = make(start=0.5, refuse="no room")
    interrupt_while_it_starts(model, log)

    async def end_of_starts() -> None:
        await asyncio.gather(*(shared.started for shared in sharing._shared.values()), return_exceptions=True)

    loop.run(end_of_starts())
    with pytest.raises(EngineFailed):
        model.predict("a")
    assert starts(log) == 2


def test_engine_for_which_others_made_room_stays_warm(
    make: Make, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the engines whose GPU it needs are closed, not the one that starts: two calls are one start."""
    monkeypatch.setattr(gpus.free_devices, "__defaults__", (tmp_path / "gpus",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")
    make(log=str(tmp_path / "other")).predict("a")
    for _ in range(2):
        make().predict("b")
    assert starts(log) == 1
    assert len(hosts()) == 1


def test_rows_of_a_dead_engine_are_asked_once_more(make: Make, log: Path) -> None:
    """After a death the open rows, and those that came meanwhile, are handed over once each."""
    model = make(start=0.5)
    model.init()
    thread, outcome = in_thread(lambda: model.predict_batches(["a", "die", "z"], max_tokens=1))
    deadline = time.monotonic() + 30
    while starts(log) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    late = model.predict_batches(["late 1", "late 2"])  # the second engine is still starting
    thread.join()
    assert outcome == [["a", "die", "z"]]
    assert late == ["late 1", "late 2"]
    assert asked(log).count("late 1") == asked(log).count("late 2") == 1
    assert asked(log).count("a") == 1
    assert asked(log).count("die") == 2


def test_row_that_kills_the_engine_twice_is_given_up(make: Make, log: Path) -> None:
    """A row at whose sight every engine dies becomes an error; the others are answered."""
    results = make().predict_batches(["a", "die always", "z"], on_error="return", temperature=0)
    assert results[0] == "a"
    assert isinstance(results[1], RowError)
    assert results[1].kind == "engine"
    assert results[1].retryable
    assert asked(log).count("die always") == 2
    assert make().predict("again") == "again"


def test_engine_that_only_dies_fails_the_call(make: Make) -> None:
    """Engines that die one after the other without an answer end the call, as a temporary failure."""
    rows = ["die always"] * 40
    with pytest.raises(EngineFailed, match="died 3 times without answering") as caught:
        make().predict_batches(rows, on_error="return")
    assert caught.value.temporary
    assert caught.value.results is not None
    assert len(caught.value.results) == 40
    assert any(isinstance(result, RowError) for result in caught.value.results)
    assert None in caught.value.results


def test_long_line_of_the_log_stops_nothing(make: Make) -> None:
    """A line of megabytes is read and dropped, and the engine does not wait on a full pipe."""
    assert make().predict_batches(["shout", "shout", "a"], max_tokens=1) == ["shout", "shout", "a"]


def test_rows_without_a_prompt_start_no_engine(make: Make, log: Path) -> None:
    """Where there is nothing to ask, no engine is started."""
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
def test_fork_does_not_cut_the_parent_off(make: Make, log: Path) -> None:
    """After a fork whose child collects its garbage, the parent's engine still answers."""
    model = make()
    model.predict("before")
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    thread, outcome = in_thread(lambda: model.predict("after"))
    thread.join(timeout=30)
    assert outcome == ["after"]
    assert starts(log) == 1
