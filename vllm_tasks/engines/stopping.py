"""Whether what the calling thread does is still wanted: the one way in which work learns that it is not.

Ctrl-C, SIGTERM and a task's `timeout_seconds` arrive as exceptions wherever a thread runs Python; a task that
was submitted has to ask. So whoever waits long for something wakes up a few times a second, and asks.
"""

from __future__ import annotations

import signal

from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.task_runners import ThreadPoolTaskRunner


def raise_if_stopped() -> None:
    """Raise `TerminationSignal` in a submitted task when the flow that waits for it has been told to end.

    Prefect tells the thread of a task nothing but by events, one for each submitted task, without a public
    name. It sets them all at once; a task that was called in a submitted one has none of its own.
    """
    run, flow = TaskRunContext.get(), FlowRunContext.get()
    if flow is None or run is None or not isinstance(flow.task_runner, ThreadPoolTaskRunner):
        return
    if any(event.is_set() for event in list(flow.task_runner._cancel_events.values())):
        raise TerminationSignal(signal.SIGTERM)
