"""One event loop in a thread of its own, on which all engines of this process live.

The public methods are synchronous and must work inside a running loop (a notebook, an async flow)
and from many threads at once, so the asynchronous side cannot use the caller's loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
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


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run on the engine loop and wait; an interrupt of the waiting thread cancels the work."""
    finished = threading.Event()

    async def work() -> T:
        try:
            return await coroutine
        finally:
            finished.set()

    future = asyncio.run_coroutine_threadsafe(work(), engine_loop())
    try:
        return future.result()
    except BaseException:
        # Ctrl-C and Prefect's TerminationSignal arrive here, in the waiting thread. The cancelled
        # work aborts its requests first, so that none outlives the call.
        future.cancel()
        finished.wait(timeout=5)
        raise
