"""The resources that this process holds, and whether they grow."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
from prefect.settings import PREFECT_API_URL

from benchmarks.results import table
from vllm_tasks.engines import loop

MIB = 2**20
UNFINISHED = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]
"""Prefect's state types in which a run must not stay."""
ENGINE = "engine, MiB"
"""Resident memory of all processes of the engine; it starts from 0 with each engine."""
DELTA = "threads of deltalake"
"""Threads of deltalake's runtime (tokio), at most one for each file open at once; each ends after 10 s
idle."""
IDLE = 12.0
"""Seconds after which these threads have ended."""
SLACK = {"process, MiB": 0.02, ENGINE: 0.02, "objects of Python": 0.01}
"""The fraction by which a resource may grow in the second half without counting as a leak; the others may
grow by less than one."""
MOST_PAIRS = 20_000


@dataclass(frozen=True)
class Sample:
    """The resources held after some `calls` and `rows`; `life` is the number of engines started so far.

    `seconds` is the wall time since the beginning. `cpu` and `engine_cpu` are CPU seconds of this process and
    of the current engine. `failed` counts the calls that raised.
    """

    part: str
    life: int
    calls: int
    rows: int
    failed: int
    seconds: float
    cpu: float
    engine_cpu: float
    held: dict[str, float]


def _command(process: psutil.Process) -> list[str]:
    """The command line of a process; none if it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def engine_processes() -> list[psutil.Process]:
    """The hosts of engines that this process has started, and their descendants."""
    hosts = [child for child in psutil.Process().children() if "host.py" in " ".join(_command(child))]
    return hosts + [process for host in hosts for process in host.children(recursive=True)]


def cpu_of(processes: Sequence[psutil.Process]) -> float:
    """The CPU seconds that processes have used so far."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def held(scratch: Path) -> dict[str, float]:
    """The amount of each resource by name; `scratch` is the folder for temporary files.

    Garbage is collected and glibc's free memory is returned first, since both would look like growth.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    mine = psutil.Process()
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    tokio = sum(name.startswith("tokio") for name in threads)
    descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors_now()]
    return {
        "process, MiB": mine.memory_info().rss / MIB,
        ENGINE: sum(process.memory_info().rss for process in engine_processes()) / MIB,
        "threads": len(threads) - tokio,
        DELTA: tokio,
        "file descriptors": len(descriptors),
        "sockets": sum(name.startswith("socket:") for name in descriptors),
        "child processes": len(mine.children(recursive=True)),
        "temporary files": sum(1 for _ in scratch.rglob("*")),
        "unfinished runs": unfinished_runs(),
        "tasks on our loop": loop.run(tasks_on_loop()) - 1,
        "objects of Python": len(gc.get_objects()),
    }


def descriptors_now() -> list[str]:
    """The open file descriptors, without the one that listing them needs."""
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


async def tasks_on_loop() -> int:
    return len(asyncio.all_tasks())


def unfinished_runs() -> int:
    """The number of flow and task runs that are not finished on Prefect's server."""
    found = 0
    for kind in ("flow_runs", "task_runs"):
        wanted = {kind: {"state": {"type": {"any_": UNFINISHED}}}}
        answer = requests.post(f"{PREFECT_API_URL.value()}/{kind}/count", json=wanted, timeout=60)
        found += answer.json()
    return found


def slope(points: Sequence[tuple[float, float, int]]) -> float:
    """The median of dy/dx over pairs of points `(x, y, group)` of one group (Theil 1950, Sen 1968)."""
    pairs = [
        (b[1] - a[1]) / (b[0] - a[0])
        for a, b in itertools.combinations(points, 2)
        if a[2] == b[2] and a[0] != b[0]
    ]
    if len(pairs) > MOST_PAIRS:
        pairs = random.Random(0).sample(pairs, MOST_PAIRS)
    return statistics.median(pairs) if pairs else 0.0


def growth(samples: Sequence[Sample], name: str, unit: str) -> float:
    """The growth of a resource for each `unit` (calls or rows), in the second half.

    The engine's memory is compared only within the second half of each engine's life.
    """
    if name != ENGINE:
        half = samples[len(samples) // 2 :]
        return slope([(getattr(s, unit), s.held[name], 0) for s in half])
    points = []
    for life, group in itertools.groupby(samples, key=lambda s: s.life):
        within = list(group)
        points += [(getattr(s, unit), s.held[name], life) for s in within[len(within) // 2 :]]
    return slope(points)


def verdict(samples: Sequence[Sample], name: str, unit: str) -> str:
    """Whether the growth over the second half, at this slope, exceeds the slack."""
    if name == DELTA:
        return "ends when idle"
    half = samples[len(samples) // 2 :]
    risen = growth(samples, name, unit) * (getattr(half[-1], unit) - getattr(half[0], unit))
    slack = SLACK.get(name, 0) * half[0].held[name] or 1
    return "grows" if risen >= slack else "steady"


def resources_table(samples: Sequence[Sample], unit: str, per: int) -> str:
    """A line for each resource: before, after a quarter, half and all of the work, and after closing."""
    first, *work, last = samples
    marks = [first, work[len(work) // 4], work[len(work) // 2], work[-1], last]
    lines = [
        [
            name,
            *(f"{mark.held[name]:,.0f}" for mark in marks),
            f"{per * growth(work, name, unit):+,.2f}",
            verdict(work, name, unit),
        ]
        for name in first.held
    ]
    head = ["held", "before", "a quarter", "half", "all", "closed", f"slope per {per:,} {unit}", "verdict"]
    return table(head, lines)
