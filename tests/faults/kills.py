"""SIGKILL at random moments to the flow and to PostgreSQL, with a scripted server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from tests.faults.ground import Ground, ScriptedRun
from tests.faults.ledger import Figures
from tests.faults.work import GENERATE, Work
from tests.jobs import Jobs
from tests.servers.scripted_server import Asked, Deed, Script, ScriptedServer

APART = 100
"""Requests between two kills in the mean; each may cost as many again, and the last must meet a run."""
LATEST = 0.1
"""Seconds after a moment that the schedule waits at most: a commit takes less."""
HELD = 10.0
"""Seconds that a request waits for a kill at most."""


def slowly(chance: random.Random, deed: Callable[[Asked], Deed] = lambda _: None) -> Script:
    """Answers after a few milliseconds, at random; rows as `deed` does."""

    async def script(asked: Asked) -> Deed:
        if not asked.body:
            return None
        await asyncio.sleep(chance.uniform(0.001, 0.03))
        return deed(asked)

    return script


class Holding:
    """A script by which the first request of each life waits for the kill, so that no run is over before,
    however busy this process is.

    Args:
        script: What the requests get that are not held, and the held one afterwards.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._life = self._held = 0

    def hold(self) -> None:
        """A life begins: its first request waits for the next call of this or of `release`."""
        self._life += 1

    def release(self) -> None:
        """No life is killed any more."""
        self._life, self._held = -1, -1

    async def __call__(self, asked: Asked) -> Deed:
        if asked.body and self._held != self._life:
            life = self._held = self._life
            until = time.monotonic() + HELD
            while life == self._life and time.monotonic() < until:  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.02)
        return await self._script(asked)


def flows(ground: Ground, kind: str, kills: int, work: Work = GENERATE, jobs: Jobs | None = None) -> Figures:
    """The flow is killed `kills` times over one table, and the same call is repeated each time."""
    name = f"kill: flow{work.name and ', '}{work.name}"
    chance = ground.chance(f"{name} {kind}")
    jobs = jobs or ground.jobs
    script = slowly(chance, work.deed)
    holding = Holding(script)
    with ScriptedServer(holding) as server:
        run = ground.run_of(name, ground.place(kind), server, 2 * APART * (kills + 1), work)
        for _ in range(kills):
            holding.hold()
            job = run.start(jobs)
            moment = somewhere(chance, run, 2 * APART)
            over = all_committed(run)  # then it kills a run that has nothing left to lose
            jobs.kill(job)
            time.sleep(0.05)  # what was sent arrives
            if not over:
                run.ledger.death(moment)
        holding.release()
        run.finish(jobs)
        run.undisturbed(jobs, script)
        return run.ledger.check()


def somewhere(chance: random.Random, run: ScriptedRun, most: int) -> str:
    """Wait for a random moment: some requests, and a little more; returns it in words."""
    more, later = chance.randint(0, most), chance.uniform(0, LATEST)
    enough = len(run.server.posts) + more
    run.server.wait_until(lambda: len(run.server.posts) >= enough or all_committed(run))
    time.sleep(later)
    return f"{more} requests and {later:.3f} s on, {len(run.server.posts)} in all"


def all_committed(run: ScriptedRun) -> bool:
    return len(run.ledger.committed()) == run.ledger.rows


def databases(ground: Ground, kills: int) -> Figures:
    """PostgreSQL is killed `kills` times during one flow, which waits and resumes: nothing is sent again."""
    chance = ground.chance("PostgreSQL")
    jobs = ground.jobs
    with ScriptedServer(slowly(chance)) as server:
        run = ground.run_of("kill: PostgreSQL", ground.place("postgres"), server, rows=200 * kills)
        job = run.start(jobs)
        for _ in range(kills):
            more, away = chance.randint(0, 100), chance.uniform(0.1, 1.5)
            enough = len(server.posts) + more
            server.wait_until(lambda: len(server.posts) >= min(enough, run.ledger.rows))  # noqa: B023
            if all_committed(run):
                break
            ground.postgres.kill()
            time.sleep(away)
            ground.postgres.start()
            run.ledger.fault(f"{more} requests on, {len(server.posts)} in all, away for {away:.1f} s")
        assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
        run.undisturbed(jobs)
        return run.ledger.check()
