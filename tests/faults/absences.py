"""Prefect's server goes away in the middle of a run, and comes back with the same database."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from typing import Literal

from tests.faults.ground import IN_FLIGHT, Ground
from tests.faults.ledger import Figures
from tests.faults.prefect_server import PrefectServer
from tests.servers.pool_workers import pool
from tests.servers.scripted_server import Asked, Script, ScriptedServer

How = Literal["killed", "frozen"]
LONGER = 5.0
"""Seconds that a run would take beyond the absence."""


def lasting(seconds: float, rows: int) -> Script:
    """A server so slow that the rows take this long."""

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(seconds * IN_FLIGHT / rows)

    return script


def away(
    ground: Ground, kind: str, how: How, seconds: float, rows: int = 600, on: str = "", python: str = ""
) -> Figures:
    """The run resumes, or stops and resumes by the same call.

    `on`: the work pool that it is routed to. `python`: that of a server of another version than ours.
    """
    home = ground.folder / f"prefect-of-another-version-{kind}"
    with PrefectServer(home, python) if python else nullcontext(ground.prefect) as prefect:
        where = " of a step on a work pool" if on else ""
        name = f"Prefect {prefect.version()}: server {how}{where}"
        chance = ground.chance(f"{name} {kind}")
        jobs = ground.jobs_in({"PREFECT_API_URL": prefect.api}) if python else ground.jobs
        with ScriptedServer(lasting(seconds + LONGER, rows)) as server:
            run = ground.run_of(name, ground.place(kind), server, rows)
            run.fields = {"compute_kwargs": {"work_pool": on}} if on else {}
            job = run.start(jobs)
            enough = chance.randint(1, rows // 4)
            server.wait_until(lambda: len(server.posts) >= enough)
            prefect.kill() if how == "killed" else prefect.freeze()
            time.sleep(seconds)
            prefect.start() if how == "killed" else prefect.thaw()
            run.go_on(jobs, job, f"{enough} requests on, away for {seconds:g} s")
            run.fields = {}
            run.undisturbed(jobs)
            return run.ledger.check()


def away_from_a_pool(ground: Ground, how: How, seconds: float) -> Figures:
    """The step that waits for a flow run on a pool also waits for the server."""
    with pool("faults", ground.folder / "workers.log") as workers:
        workers.start()
        return away(ground, "lake", how, seconds, on=workers.name)
