"""Work on the engine loop, and the threads that wait for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from tests.eventually import LONG_ENOUGH
from vllm_tasks.engines import loop
from vllm_tasks.errors import InvalidCall


def test_an_interrupt_before_the_wait_begins_cancels_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may be raised when the loop has the work already, and the thread does not wait for it yet."""
    begun, cancelled, strikes = threading.Event(), threading.Event(), [KeyboardInterrupt]
    wakes = loop.engine_loop()._write_to_self  # type: ignore[attr-defined]

    async def work() -> None:
        begun.set()
        try:
            await asyncio.sleep(LONG_ENOUGH)
        finally:
            cancelled.set()

    def interrupted() -> None:
        wakes()
        if strikes and threading.current_thread() is threading.main_thread():
            assert begun.wait(LONG_ENOUGH)
            raise strikes.pop()

    monkeypatch.setattr(loop.engine_loop(), "_write_to_self", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert cancelled.is_set()


def test_work_that_others_cancel_is_an_exception_for_its_caller() -> None:
    """It is the one of threads: asyncio's would count as a cancellation of the caller."""

    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CancelledError):
        loop.run(work())


def test_work_that_waits_for_its_own_loop_is_refused() -> None:
    """A check that calls a model would wait for ever, and every engine of the process with it."""

    def give_up() -> None:
        raise TimeoutError

    async def check() -> None:
        loop.run(asyncio.sleep(0), give_up)

    with pytest.raises(InvalidCall, match="second call"):
        loop.run(check())


def test_a_loop_whose_thread_cannot_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no more threads, the next call fails like the first."""

    def no_more(thread: threading.Thread) -> None:
        thread._target.__self__.close()  # type: ignore[attr-defined]
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(loop, "_loop", None)
    monkeypatch.setattr(threading.Thread, "start", no_more)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="new thread"):
            loop.engine_loop()
