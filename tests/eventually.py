"""Waits for other processes and threads."""

from __future__ import annotations

import time
from collections.abc import Callable
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
