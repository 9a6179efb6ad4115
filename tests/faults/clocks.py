"""Clocks that jump: the wall clock of the flow's process, for all libraries in it (`clock.c`)."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.faults.ground import Ground, Lacking
from tests.faults.kills import slowly
from tests.faults.ledger import Figures
from tests.servers.scripted_server import ScriptedServer

HOUR = 3600
SOURCE = Path(__file__).with_name("clock.c")


class WallClock:
    """The wall clock of the processes that have `env`."""

    def __init__(self, folder: Path) -> None:
        """Raises `Lacking` where there is no C compiler."""
        if (compiler := shutil.which("cc")) is None:
            raise Lacking("needs a C compiler: apt-get install gcc")
        library = folder / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self._ahead = folder / "clock"
        self.env = {"LD_PRELOAD": str(library), "WALL_CLOCK": str(self._ahead)}
        self.set(0)

    def set(self, ahead: int) -> None:
        """Set it to so many seconds before the true time."""
        with self._ahead.open("r+b" if self._ahead.exists() else "wb") as file:  # it is mapped: not replaced
            file.write(struct.pack("q", ahead))


def jump(ground: Ground, kind: str) -> Figures:
    """The clock goes an hour forwards, then two back, in a run that processes all rows again: none twice.

    If PostgreSQL holds the tables it is lost after that, and the reader has to find the remaining rows.
    """
    chance = ground.chance(f"clock {kind}")
    folder = ground.folder / f"clock-{kind}"
    folder.mkdir()
    clock = WallClock(folder)
    jobs = ground.jobs_in(clock.env)
    with ScriptedServer(slowly(chance)) as server:
        run = ground.run_of("clock: an hour forwards, two back", ground.place(kind), server, rows=1200)
        run.undisturbed(ground.jobs, slowly(chance))
        run.finish(ground.jobs)
        server.requests.clear()
        job = run.start(jobs, overwrite=True)
        for ahead in (HOUR, -HOUR):
            enough = len(server.posts) + chance.randint(50, 300)
            server.wait_until(lambda: len(server.posts) >= enough)  # noqa: B023
            clock.set(ahead)
            run.ledger.fault(f"{len(server.posts)} requests: {ahead:+d} s")
        if kind == "postgres":
            ground.postgres.kill()
            ground.postgres.start()
            run.ledger.fault(f"{len(server.posts)} requests: PostgreSQL killed")
        assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
        assert len(server.posts) >= run.ledger.rows
        return run.ledger.check()
