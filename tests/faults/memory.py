"""Hosts that are out of memory: a neighbour takes what is left, and the kernel kills a process of ours."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.eventually import eventually
from tests.faults import neighbour
from tests.faults.absences import lasting
from tests.faults.engines import local
from tests.faults.ground import Ground, Lacking
from tests.faults.kills import APART, Holding, somewhere
from tests.faults.ledger import Figures
from tests.servers.scripted_server import ScriptedServer

LEFT = 128 * 2**20
"""Bytes that the neighbour finds."""
ROWS = 300
"""For each kill of a flow."""
RATE = 150.0
"""Rows a second: a neighbour needs half a second."""
CGROUPS = Path("/sys/fs/cgroup/memory")


class MemoryGroup:
    """A memory cgroup (version 1) below that of this process.

    Raises `Lacking` where there are none, or where none may be made.
    """

    def __init__(self) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split(":")[2] for line in lines if line.split(":")[1] == "memory"), None)
        if own is None:
            raise Lacking("needs memory cgroups of version 1")
        self.path = CGROUPS / own.lstrip("/") / f"vllm-tasks-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> Self:
        try:
            self.path.mkdir()
        except OSError as error:
            raise Lacking(f"cannot make a memory cgroup: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._read("cgroup.procs").split():  # after an error there may be some
            with suppress(ProcessLookupError):
                (self.path.parent / "cgroup.procs").write_text(process)
        assert eventually(self._removed), f"{self.path} is still in use"

    def _removed(self) -> bool:
        """Whether it is gone; a killed process leaves it once its memory is free."""
        with suppress(OSError):
            self.path.rmdir()
        return not self.path.exists()

    def add(self, process: int) -> None:
        """Take in a process and all that it starts from now on, which the kernel kills before a neighbour."""
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")
        self._write("cgroup.procs", process)

    def starve(self) -> None:
        """Let a neighbour take all memory until the kernel has killed the largest process."""
        before = neighbour.killed(self.path)
        self._write("memory.limit_in_bytes", int(self._read("memory.usage_in_bytes")) + LEFT)
        ended = subprocess.run([sys.executable, neighbour.__file__, self.path, str(before)])
        self._write("memory.limit_in_bytes", -1)
        # What the other one had may be free too late for the neighbour, which is killed as well then.
        itself = ended.returncode == -signal.SIGKILL
        assert neighbour.killed(self.path) - itself > before, f"no process was killed: {ended}"

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(f"{value}")


def flows(ground: Ground, kind: str, kills: int) -> Figures:
    """The kernel kills the flow, and the same call is repeated each time."""
    name = "kill: flow, out of memory"
    chance = ground.chance(f"{name} {kind}")
    rows = ROWS * (kills + 1)
    holding = Holding(lasting(rows / RATE, rows))
    with MemoryGroup() as group, ScriptedServer(holding) as server:
        run = ground.run_of(name, ground.place(kind), server, rows)
        for _ in range(kills):
            holding.hold()
            job = run.start(ground.jobs)
            group.add(job)
            moment = somewhere(chance, run, APART)
            group.starve()
            assert ground.jobs.wait(job) == -signal.SIGKILL
            time.sleep(0.05)  # what was sent arrives
            run.ledger.death(moment)
        holding.release()
        run.finish(ground.jobs)
        run.undisturbed(ground.jobs)
        return run.ledger.check()


def engine(ground: Ground, kind: str, kills: int) -> Figures:
    """The kernel kills the largest process, which is one of the engine's; the flow starts another engine."""
    with MemoryGroup() as group:

        def end(_: random.Random, job: int) -> str:
            group.starve()
            return "out of memory"

        return local(ground, kind, kills, "kill: engine (real), out of memory", end, group.add)
