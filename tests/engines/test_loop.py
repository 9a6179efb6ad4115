"""Work on the engine loop, and the threads that wait for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from tests.eventually import LONG_ENOUGH
from vllm_tasks.engines import loop


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
