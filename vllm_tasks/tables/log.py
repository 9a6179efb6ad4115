"""The progress of a run: a live line in a terminal, else lines of the log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler

from vllm_tasks.engines.stopping import pause
from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import Report

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
                pause(delay)
        return work()

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._logged >= min(PROGRESS_EVERY, max(FIRST_PROGRESS, self._logged - self._began)):
            self._logged = now
            logger.info("%s", progress)

    def stopped(self, committed: Report) -> None:
        pass  # the run itself logs what is committed

    def close(self) -> None:
        pass


class Terminal(Log):
    """A `Log` that is one live line where standard error is a terminal; the package's log goes above it."""

    taken = threading.Lock()
    """Held by the one run of the process that has the line; others log."""

    def __init__(self) -> None:
        super().__init__()
        self._console = _terminal()
        self._open = ExitStack()
        self._live: Live | None = None
        self._shown = float("-inf")

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        if self._console and self._live is None and Terminal.taken.acquire(blocking=False):
            self._open.callback(Terminal.taken.release)
            self._live = self._open.enter_context(_live_line(self._console))
        if self._live is None:
            super().progress(progress, last=last)
        elif last or time.monotonic() - self._shown >= REFRESHED_EVERY:
            self._shown = time.monotonic()
            with suppress(OSError):  # of a terminal that has gone
                self._live.update(str(progress), refresh=True)

    def close(self) -> None:
        self._live = None
        self._open.close()


def _terminal() -> Console | None:
    """Standard error, if it is a terminal that can redraw a line, and progress is wanted."""
    if not _is_terminal(sys.stderr) or not package_logger.isEnabledFor(logging.INFO):
        return None
    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


@contextmanager
def _live_line(console: Console) -> Iterator[Live]:
    """A live line, above which the package's log is printed in place of what other handlers print there."""
    above = RichHandler(console=console, show_path=False)
    others = [h for h in handlers_of(__name__) if _is_terminal(getattr(h, "stream", None))]
    package_logger.addHandler(above)
    for handler in others:
        handler.addFilter(_is_of_others)
    # Where standard output is a file, what is printed must go there.
    live = Live(console=console, auto_refresh=False, redirect_stdout=_is_terminal(sys.stdout))
    try:
        with suppress(OSError):
            live.start()
        yield live
    finally:
        for handler in others:
            handler.removeFilter(_is_of_others)
        package_logger.removeHandler(above)
        with suppress(OSError):
            live.stop()


def handlers_of(name: str) -> Iterator[logging.Handler]:
    """All handlers that get the lines of this logger."""
    found: logging.Logger | None = logging.getLogger(name)
    while found is not None:
        yield from found.handlers
        found = found.parent if found.propagate else None


def _is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; False for what is closed, missing or no complete stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _is_of_others(record: logging.LogRecord) -> bool:
    return not record.name.startswith(package_logger.name)
