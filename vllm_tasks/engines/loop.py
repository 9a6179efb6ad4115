"""The event loop, in a thread of its own, on which all engines of this process run.

The public methods are synchronous and must work inside a running loop (a notebook, an async flow)
and from many threads at once, so the asynchronous side cannot use the caller's loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from vllm_tasks.errors import InvalidCall

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def engine_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started on first use. A forked child gets a loop of its own."""
    global _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="vllm-tasks", daemon=True).start()
            _loop = loop  # only now: nobody may wait for a loop that no thread runs
        return _loop


_of_the_parent: list[object] = []
"""Objects that a forked child inherited and must never finalize. The child shares the parent's epoll object;
closing a transport in the child would unregister it there, and the parent would hear nothing from it."""


def keep_from_parent(*inherited: object) -> None:
    """Keep the parent's objects alive in a forked child, so that garbage collection never closes them."""
    _of_the_parent.extend(inherited)


def _reset_in_child() -> None:
    global _lock, _loop  # another thread of the parent may have held the lock at the fork
    keep_from_parent(_loop)
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_reset_in_child)


WAKE_EVERY = 0.2
"""Seconds after which a waiting thread wakes up, so that it can be interrupted."""


def run(coroutine: Coroutine[Any, Any, T], stop: Callable[[], None] = lambda: None) -> T:
    """Run a coroutine on the engine loop and wait for it; interrupting the waiting thread cancels it.

    `stop` is called a few times a second and raises an exception if the work is to be cancelled. Raises
    `InvalidCall` on the engine loop itself, which would wait for itself.
    """
    loop, finished, begun = engine_loop(), threading.Event(), list[asyncio.Task[T]]()
    with suppress(RuntimeError):  # no event loop runs in this thread
        if asyncio.get_running_loop() is loop:
            coroutine.close()
            raise InvalidCall(
                "a model was called by a check or a decoder, for which all engines of this process wait: "
                "judge answers with a model in a second call, or with the metric judge of validate"
            )

    def begin() -> None:
        begun.append(loop.create_task(coroutine))
        begun[0].add_done_callback(ended)

    def ended(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # an interrupted thread does not ask for it, and asyncio would log it
        finished.set()

    def cancel() -> None:
        if begun:
            begun[0].cancel()
        else:
            coroutine.close()
            finished.set()

    try:
        # Not `run_coroutine_threadsafe`: interrupted before it returns, its work could not be cancelled.
        loop.call_soon_threadsafe(begin)
        while not finished.wait(WAKE_EVERY):
            stop()
    except BaseException:
        # Ctrl-C, Prefect's TerminationSignal and a task's timeout are raised here, in the waiting thread. The
        # cancelled work aborts its requests, so wait for it: no request may outlive the call.
        loop.call_soon_threadsafe(cancel)
        finished.wait(timeout=5)
        raise
    if begun[0].cancelled():
        raise CancelledError  # not asyncio's, which is not an `Exception` and would cancel the caller
    return begun[0].result()


class Tasks:
    """Work on the engine loop that other threads start, wait for, and cancel together."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._ended = False

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start `work()`. After `end` it is cancelled immediately."""

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
        """Cancel all running work and wait up to `timeout` seconds for it."""

        async def cancel_all() -> None:
            self._ended = True
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running, timeout=timeout)

        run(cancel_all())
