"""One event loop in a thread of its own, on which all engines of this process live.

The public methods are synchronous and must work inside a running loop (a notebook, an async flow)
and from many threads at once, so the asynchronous side cannot use the caller's loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def engine_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started at first use; a forked child gets one of its own."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="vllm-tasks", daemon=True).start()
        return _loop


_of_the_parent: list[object] = []
"""What a forked child has inherited and must never finalize: it shares the parent's epoll instance, and
closing a transport here would make the parent deaf to its own."""


def keep_from_parent(*inherited: object) -> None:
    """Keep the parent's objects alive in a forked child, untouched."""
    _of_the_parent.extend(inherited)


def _begin_anew() -> None:
    global _lock, _loop
    keep_from_parent(_loop)
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_begin_anew)


LOOKED_EVERY = 0.2
"""Seconds between two turns of a waiting thread, in which it can be interrupted."""


def run(coroutine: Coroutine[Any, Any, T], stop: Callable[[], None] = lambda: None) -> T:
    """Run on the engine loop and wait; an interrupt of the waiting thread cancels the work.

    `stop` is called a few times a second, and raises when the work is not wanted any more.
    """
    finished = threading.Event()

    async def work() -> T:
        try:
            return await coroutine
        finally:
            finished.set()

    future = asyncio.run_coroutine_threadsafe(work(), engine_loop())
    try:
        while not finished.wait(LOOKED_EVERY):
            stop()
        return future.result()
    except BaseException:
        # Ctrl-C, Prefect's TerminationSignal and a task's timeout arrive here, in the waiting thread. The
        # cancelled work aborts its requests first, so that none outlives the call.
        future.cancel()
        finished.wait(timeout=5)
        raise


class Tasks:
    """Work on the engine loop that other threads start, wait for, and end together."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._ended = False

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin `work()`; cancelled at once when all has ended already."""

        async def run_it() -> T:
            if self._ended:
                raise asyncio.CancelledError
            task = asyncio.current_task()
            assert task is not None
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            return await work()

        return asyncio.run_coroutine_threadsafe(run_it(), engine_loop())

    def end(self, timeout: float) -> None:
        """Cancel what runs and wait for its end, `timeout` seconds at most."""

        async def cancel_all() -> None:
            self._ended = True
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running, timeout=timeout)

        run(cancel_all())
