"""Detects that the flow which waits for the calling thread has been stopped.

Ctrl-C, SIGTERM and a task's `timeout_seconds` are raised as exceptions wherever a thread runs Python. A
submitted task gets no exception, nor does a coroutine that blocks its event loop with our call, nor a thread
(`asyncio.to_thread`) whose flow has ended meanwhile. So every long wait wakes up a few times a second and
checks.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress

from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.context import ContextModel, FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.task_runners import ThreadPoolTaskRunner

from vllm_tasks.engines.loop import WAKE_EVERY


def raise_if_stopped() -> None:
    """Raise `CancelledError` in a coroutine that is being cancelled, as by the Ctrl-C of `asyncio.run`, and
    `TerminationSignal` in a submitted task if the flow that waits for it is being stopped, and in a thread of
    an asynchronous flow or task that has failed, crashed or been cancelled.

    Prefect signals the thread of a task only by an event for each submitted task, which has no public
    name. It sets all of them at once. A task that was called in a submitted task has no event of its own.
    """
    with suppress(RuntimeError):  # no event loop runs in this thread
        # Only asyncio knows of a cancellation that it has not raised yet, since our call blocks its loop.
        if getattr(asyncio.current_task(), "_must_cancel", False):
            raise asyncio.CancelledError
    run, flow = TaskRunContext.get(), FlowRunContext.get()
    if (run and _is_left(run, run.task_run)) or (flow and _is_left(flow, flow.flow_run)):
        raise TerminationSignal(signal.SIGTERM)
    if flow is None or run is None or not isinstance(flow.task_runner, ThreadPoolTaskRunner):
        return
    if any(event.is_set() for event in list(flow.task_runner._cancel_events.values())):
        raise TerminationSignal(signal.SIGTERM)


def _is_left(context: ContextModel, run: FlowRun | TaskRun | None) -> bool:
    """Whether a run that did not complete has left its context, of which a thread has a copy.

    A hook of a failed run is called within the context. Prefect has no public name for this.
    """
    return context._token is None and not (run and run.state and run.state.is_completed())


def pause(seconds: float) -> None:
    """Sleep, and raise soon what `raise_if_stopped` raises."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, WAKE_EVERY))
        raise_if_stopped()
