"""CPU seconds of a process and its descendants, separately for vLLM's engine and the rest."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

EVERY = 0.5
"""Seconds between two readings; what a process uses between its last reading and its end is not counted."""
ENGINE = b"VLLM::"
"""The beginning of the names of vLLM's engine processes (`VLLM::EngineCore`, `VLLM::Worker`)."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds (user and system) of the engine's processes and of all others."""

    engine: float
    client: float


class Meter:
    """Reads the CPU times of the process `root` and its descendants in /proc, from entry to exit; proc(5)."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._engine: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._first = dict(self._last)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def usage(self) -> Usage:
        """The CPU seconds used between entry and exit."""
        spent = {pid: seconds - self._first.get(pid, 0.0) for pid, seconds in self._last.items()}
        engine = sum(seconds for pid, seconds in spent.items() if pid in self._engine)
        return Usage(engine, sum(spent.values()) - engine)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._look()

    def _look(self) -> None:
        for pid, seconds in tree(self._root).items():
            self._last[pid] = seconds
            if pid not in self._engine and ENGINE in command_of(pid):
                self._engine.add(pid)


def tree(root: int) -> dict[int, float]:
    """CPU seconds by PID, for a process and its descendants: user and system, without those of children."""
    seconds: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            _, _, after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended meanwhile
        fields = after_name.split()
        children.setdefault(int(fields[1]), []).append(pid)
        seconds[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    found = [root]
    for pid in found:  # the list grows while it is iterated
        found += children.get(pid, [])
    return {pid: seconds[pid] for pid in found if pid in seconds}


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
