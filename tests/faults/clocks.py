"""Clocks that jump: the wall clock of the flow's process, by Debian's libfaketime."""

from __future__ import annotations

from pathlib import Path

from tests.faults.ground import Ground, asked_of
from tests.faults.kills import slowly
from tests.faults.ledger import Figures
from tests.scripted_server import ScriptedServer

HOUR = 3600


def library() -> Path | None:
    """Its build for programs with threads, where it is installed (`apt-get install faketime`)."""
    found = sorted(Path("/usr/lib").glob("**/libfaketimeMT.so.1"))
    return found[0] if found else None


def jump(ground: Ground, kind: str, lost_database: bool = False) -> Figures:
    """An hour forwards, then two back, in the middle of a run that asks all rows again: none twice.

    `lost_database`: it is lost after that, so that the reader has to find out anew what is left to ask.
    """
    chance = ground.chance(f"clock {kind}")
    now = ground.folder / f"now-{kind}"
    now.write_text("+0")
    env = {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_CACHE_DURATION": "1",  # second: it looks often enough, and costs little
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which no jump of the wall clock moves
        "DONT_FAKE_MONOTONIC": "1",
    }
    jobs = ground.jobs_in(env)
    with ScriptedServer(slowly(chance)) as server:
        run = ground.run_of("clock: an hour forwards, two back", ground.place(kind), server, rows=1200)
        run.finish(ground.jobs)
        run.undisturbed(ground.jobs)
        server.requests.clear()
        job = run.start(jobs, overwrite=True)
        for ahead in (HOUR, -HOUR):
            enough = len(server.posts) + chance.randint(50, 400)
            server.wait_until(lambda: len(server.posts) >= enough, 60)  # noqa: B023
            now.write_text(f"{ahead:+d}")
            run.ledger.fault(f"{len(server.posts)} requests: {ahead:+d} s")
        if lost_database:
            server.wait_until(lambda: len(server.posts) >= 600, 60)
            ground.postgres.kill()
            ground.postgres.start()
            run.ledger.fault(f"{len(server.posts)} requests: PostgreSQL killed")
        assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
        assert sum(asked_of(server).values()) >= run.ledger.rows
        return run.ledger.check()
