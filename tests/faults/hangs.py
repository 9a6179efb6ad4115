"""Engines that hang: a process of theirs is stopped (SIGSTOP), and nothing comes any more."""

from __future__ import annotations

import random

import psutil

from tests.eventually import eventually
from tests.faults.engines import CALL, IN_ITS_PIPE, engine_of, local, progressed, told_by
from tests.faults.ground import Ground
from tests.faults.ledger import UNDISTURBED, Figures, Ledger

ROWS = 100
"""For each hang of a scripted host."""
PAUSE = 0.03
"""Seconds that it takes for a row."""
TIMEOUT = 5.0
"""Seconds without progress after which it counts as dead."""


def real(ground: Ground, kind: str, hangs: int) -> Figures:
    """Any process of a real engine is stopped; the flow ends the engine and starts another."""
    return local(ground, kind, hangs, "hang: engine (real)", stopped)


def stopped(chance: random.Random, job: int, program: str = "engines/local/host.py") -> str:
    """Stop one of the engine's processes, any of them, and wait until the flow has killed it."""
    victim = chance.choice(engine_of(job, program))
    words = " ".join(victim.cmdline())[:60]
    victim.suspend()
    assert eventually(lambda: gone(victim)), f"still there: {words}"
    return words


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def scripted(ground: Ground, kind: str, hangs: int) -> Figures:
    """The scripted host is stopped; the flow ends it, starts another, and repeats what it had."""
    name = "hang: engine (scripted)"
    chance = ground.chance(f"{name} {kind}")
    log = ground.folder / f"hangs-{kind}.log"
    ledger = Ledger(name, ground.place(kind), ROWS * (hangs + 1), ground.seed, lambda: told_by(log))
    jobs = ground.jobs_in({"VLLM_TASKS_ENGINE_TIMEOUT": f"{TIMEOUT:g}"})
    fields = {
        "identifier": "m",
        "model_name": "m",
        "chat": False,
        "vllm_kwargs": {"log": f"file:{log}", "pause": PAUSE},
        "db": {"url": ledger.place.url},
    }
    job = jobs.start(fields, "text", "rows", work="on_scripted_host", **CALL)
    for _ in range(hangs):
        moment = progressed(chance, ledger, ROWS, job)
        stopped(chance, job, "scripted_host.py")
        ledger.fault(moment)
        ledger.spare += IN_ITS_PIPE
    assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
    counted = ledger.asked()
    ledger.asked = lambda: counted
    jobs.run(fields, "text", "rows", work="on_scripted_host", predict_id=UNDISTURBED)
    return ledger.check()
