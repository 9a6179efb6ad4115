"""The package's log lines in the logs of the Prefect runs that they are about, without any setting."""

from __future__ import annotations

import logging

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.log import handlers_of

package_logger = logging.getLogger("vllm_tasks")


class RunLogs(APILogHandler):
    """Sends lines to Prefect's server where they are logged within a run.

    Work on the package's event loop and in its threads has the context of the call that began it. Where a
    site has put Prefect's own handler onto a logger of the line, that one sends it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        in_run = FlowRunContext.get() or TaskRunContext.get()
        if in_run and not any(type(other) is APILogHandler for other in handlers_of(record.name)):
            super().emit(record)


def follow() -> None:
    """Log from `VLLM_TASKS_LOG_LEVEL` on, unless a level is set already, and to the runs."""
    if package_logger.level == logging.NOTSET:
        try:
            package_logger.setLevel(site_settings().log_level)
        except InvalidCall:  # reported where settings are used
            package_logger.setLevel(logging.INFO)
    if not any(isinstance(handler, RunLogs) for handler in package_logger.handlers):
        package_logger.addHandler(RunLogs())
