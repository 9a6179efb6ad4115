"""Processes, ports and mounts that a run of faults must not leave behind."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

MARK = "VLLM_TASKS_FAULTS"
"""In the environment of all that is started meanwhile, however far it goes from its parents."""
ENDING = 30.0
"""Seconds that a process has to end after its signal."""


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Raises AssertionError with everything that was created in the block and still exists."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        # Else a process that gives itself a title, as vLLM's do, loses the mark.
        patch.setenv("SPT_NOENV", "1")
        patch.setenv("VLLM_RPC_BASE_PATH", str(folder))  # where a killed vLLM leaves its sockets
        yield
    until = time.monotonic() + ENDING
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, f"still there: {left}"
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    assert not mounts, f"still mounted: {mounts}"


def marked(mark: str) -> list[str]:
    """The processes that were started with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            own = process.environ().get(MARK) == mark and process.pid != os.getpid()
            own = own and process.status() != psutil.STATUS_ZOMBIE
            words = " ".join(process.cmdline())[:200]
        except psutil.Error:
            continue
        if own:
            found.append(f"{process.pid} {words}")
    return found
