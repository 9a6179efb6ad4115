"""The grace period for a Prefect server that is down for a while, as in an update: no step fails for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

import httpx

from vllm_tasks.engines.loop import WAKE_EVERY
from vllm_tasks.engines.stopping import pause, raise_if_stopped

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_PERIOD = 300.0
"""Seconds that Prefect's server may be down when a flow run is to be created or to report its outcome."""
ATTEMPT_EVERY = 2.0
"""Seconds between two attempts."""
BEGINS_WITHIN = 1.0
"""Seconds in which a thread begins, if an interrupt came after its start and not before."""


def within_grace_period(work: Callable[[], T], *, to_finish: float = 0.0) -> T:
    """Return `work()`, repeated while Prefect's server cannot be reached.

    `work` must be safe to repeat: its response may be lost after the server has done it. Prefect's own client
    retries only once it has reached the server, which may take a minute.

    Args:
        work: Sends the requests. It is called in another thread, with the context of this one.
        to_finish: Seconds for `work` to finish after an interrupt.

    Returns:
        What `work` returned.

    Raises:
        httpx.HTTPError: The server stays away for longer than the grace period, or refuses.
    """
    until = time.monotonic() + GRACE_PERIOD
    while True:
        try:
            return in_thread(work, to_finish)
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > until:
                raise
            logger.warning("Prefect's server does not respond; trying again: %s", error or repr(error))
            pause(ATTEMPT_EVERY)


def in_thread(work: Callable[[], T], to_finish: float = 0.0) -> T:
    """Return `work()`, called in a thread with this context, so that the wait for it can be interrupted.

    It also serves functions of Prefect that return a coroutine in a running loop. On an interrupt, `work` has
    `to_finish` seconds to finish.
    """
    found: list[T] = []
    failed: list[BaseException] = []
    # Events instead of the thread's own: it does not know of a start or join that was interrupted.
    begun, finished = threading.Event(), threading.Event()

    def do() -> None:
        begun.set()
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            failed.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=copy_context().run, args=(do,), name="vllm-tasks-prefect", daemon=True)
    try:
        thread.start()
        while not finished.wait(WAKE_EVERY):
            raise_if_stopped()
    except BaseException:
        if begun.wait(BEGINS_WITHIN):
            finished.wait(to_finish)
        raise
    if failed:
        raise failed[0]
    return found[0]
