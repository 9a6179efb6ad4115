"""The progress of a run: a live line in a terminal, else lines of the log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler

from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.report import Progress

logger = logging.getLogger(__name__)
package_logger = logging.getLogger("vllm_tasks")

PROGRESS_EVERY = 30.0
"""The longest time between two lines of progress, in seconds; they come sooner at first."""
FIRST_PROGRESS = 3.0
"""Seconds until the first line. The next ones come each time that the run has become twice as old."""
REFRESHED_EVERY = 0.5
"""Seconds between two states of the live line."""


class Log:
    """A `Display` in the log: a line of progress now and then. It repeats commits itself."""

    def __init__(self) -> None:
        self._began = self._logged = time.monotonic()

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Commit a group, and retry when the tables are unavailable.

        Args:
            name: The keys of the group, for the log.
            work: Writes the group; may be called several times.

        Raises:
            TablesUnavailable: The last attempt failed, too.
        """
        for delay in RETRY_DELAYS:
            try:
                return work()
            except TablesUnavailable as error:
                logger.warning("commit of %s failed, next attempt in %d s: %s", name, delay, error)
                time.sleep(delay)
        return work()

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._logged >= min(PROGRESS_EVERY, max(FIRST_PROGRESS, self._logged - self._began)):
            self._logged = now
            logger.info("%s", progress)

    def close(self) -> None:
        pass


class Terminal(Log):
    """A `Log` that is one live line where standard error is a terminal; the package's log goes above it."""

    taken = threading.Lock()
    """Held by the one run of the process that has the line; others log."""

    def __init__(self) -> None:
        super().__init__()
        self._line: _Line | None = None

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        if self._line is None and _Line.is_wanted() and Terminal.taken.acquire(blocking=False):
            self._line = _Line()
        if self._line is None:
            super().progress(progress, last=last)
        else:
            self._line.show(progress, last)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
            Terminal.taken.release()


class _Line:
    """The live line; until it is closed, the package's log is printed above it and nowhere else."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False)
        self._shown = float("-inf")
        self._handler = RichHandler(console=console, show_path=False)
        self._propagated = package_logger.propagate
        package_logger.addHandler(self._handler)
        package_logger.propagate = False
        self._live.start()

    def show(self, progress: Progress, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._shown >= REFRESHED_EVERY:
            self._shown = now
            self._live.update(str(progress), refresh=True)

    @staticmethod
    def is_wanted() -> bool:
        return sys.stderr.isatty() and package_logger.isEnabledFor(logging.INFO)

    def close(self) -> None:
        self._live.stop()
        package_logger.removeHandler(self._handler)
        package_logger.propagate = self._propagated
