"""Waits for other processes and threads."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LONG_ENOUGH = 240.0
"""Seconds within which anything happens on a busy machine: a limit that only a failing test reaches."""


def eventually(condition: Callable[[], Any], seconds: float = LONG_ENOUGH) -> bool:
    """Whether `condition` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def ends(seconds: float = LONG_ENOUGH) -> Iterator[None]:
    """Raise `TimeoutError` in what takes longer, which need not wait for anything: a search, a sum."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it had not ended after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
