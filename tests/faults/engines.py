"""SIGKILL at random moments to engines: the tiny real vLLM here, on Ray, and as a server."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import requests

from benchmarks.recording import Recording
from benchmarks.servers import flags
from tests.conftest import TINY_ARGS
from tests.eventually import LONG_ENOUGH
from tests.faults.ground import GROUP, Ground, ScriptedRun
from tests.faults.kills import LATEST
from tests.faults.ledger import UNDISTURBED, Figures, Ledger
from tests.servers.ports import free_port
from tests.servers.scripted_server import Asked, Deed, ScriptedServer, refused
from tests.tiny_model import make_tiny_model
from vllm_tasks.engines.local.in_flight import DEATHS_OF_A_ROW

IN_ITS_PIPE = 8
"""Rows that a scripted host has and has not reported yet: its window, in full chunks."""
WINDOW = 40
"""Rows that an engine with `TINY_ARGS` has at most: ceil(1.1 * 32), and the rest of a chunk of 4."""
SAMPLING = {"temperature": 0, "max_tokens": 128, "ignore_eos": True}
ROWS = 300
"""For each kill of a real engine, which answers so many in some seconds."""
HANGS = 30.0
"""Seconds without a token after which a real engine hangs; more than a busy machine takes for one."""
TO_STOP = 4
"""Kills that a call survives with two replicas but for one: each at work, and again as it starts anew."""
CALL: dict[str, Any] = {"max_chunk_size": GROUP, "max_failed": None}


End = Callable[[random.Random, int], str]
"""Ends an engine of a job in some way; returns in words how."""


def killed(chance: random.Random, job: int) -> str:
    """Kill one of its processes, any of them."""
    victim = chance.choice(engine_of(job))
    words = " ".join(victim.cmdline())[:60]
    victim.kill()
    return words


def local(
    ground: Ground,
    kind: str,
    kills: int,
    name: str = "kill: engine (real)",
    end: End = killed,
    began: Callable[[int], None] = lambda _: None,
) -> Figures:
    """Engines end one after another during one flow. `began` is called with the flow's process id."""
    chance = ground.chance(f"{name} {kind}")
    ledger = Ledger(name, ground.place(kind), ROWS * kills, ground.seed, Counter, exact=False)
    # With a log of its own, which tells what the engine was asked.
    jobs = ground.jobs_in({"VLLM_TASKS_ENGINE_TIMEOUT": f"{HANGS:g}"})
    fields = model_of(ground) | {"db": {"url": ledger.place.url}}
    job = jobs.start(fields, "text", "rows", work="in_flow", **CALL)
    began(job)
    for _ in range(kills):
        moment = progressed(chance, ledger, ROWS)
        ledger.fault(f"{moment}: {end(chance, job)}")
    assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
    asked = len(re.findall(r"Added request ", jobs.log.read_text()))
    twice_dead = errors_of(ledger, kills)
    if twice_dead:
        jobs.run(fields, "text", "rows", work="in_flow", retry_failed=True)
    jobs.run(fields, "text", "rows", predict_id=UNDISTURBED)
    assert asked >= ledger.rows
    again, bound = asked - ledger.rows, WINDOW * kills
    assert again <= bound, ledger.moments
    return replace(ledger.check(), again=again + len(twice_dead), bound=bound + len(twice_dead))


def errors_of(ledger: Ledger, kills: int) -> list[int]:
    """The rows that failed: those that were in an engine at two deaths, so a window of them for two kills."""
    found = [row["id"] for row in ledger.committed() if row["_error"]]
    assert len(found) <= WINDOW * (kills // DEATHS_OF_A_ROW), (found, ledger.moments)
    return found


def model_of(ground: Ground) -> dict[str, Any]:
    return {
        "identifier": "m",
        "model_name": str(make_tiny_model(ground.folder / "tiny")),
        "vllm_kwargs": {**TINY_ARGS, "enable_log_requests": True},
        "predict_kwargs": SAMPLING,
    }


def progressed(chance: random.Random, ledger: Ledger, most: int, job: int | None = None) -> str:
    """Wait for so many more commits and a little longer, or the end of the job; returns the moment."""
    more, later = chance.randint(GROUP, most - 3 * GROUP), chance.uniform(0, 5 * LATEST)
    enough = min(len(ledger.committed()) + more, ledger.rows - 2 * GROUP)
    until = time.monotonic() + LONG_ENOUGH
    while len(ledger.committed()) < enough and (job is None or lives(job)):
        assert time.monotonic() < until, f"no {enough} rows within {LONG_ENOUGH} s: {ledger.moments}"
        time.sleep(0.1)
    time.sleep(later)
    return f"{more} rows committed and {later:.3f} s on"


def engine_of(job: int, program: str = "engines/local/host.py") -> list[psutil.Process]:
    """The host and the processes that vLLM has started from it."""
    hosts = [p for p in psutil.Process(job).children() if program in " ".join(p.cmdline())]
    found = [p for host in hosts for p in (host, *host.children(recursive=True))]
    return [p for p in found if "resource_tracker" not in " ".join(p.cmdline())]


# ---------------------------------------------------------------------- a server


class Served:
    """vLLM's own OpenAI server with the tiny model; killed and restarted at the same port."""

    def __init__(self, ground: Ground) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = ground.folder / "server.log"
        model = str(make_tiny_model(ground.folder / "tiny"))
        self._command = [sys.executable, "-m", "benchmarks.api_server", "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), *flags({"model": model, **TINY_ARGS})]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once, so that clients have to wait."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def is_healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        """Kill it with its engine, which would outlive it."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Gateway:
    """Forwards to the server, keeps its answers, and sends 502 while it is away: one request more."""

    def __init__(self, url: str) -> None:
        self.recording = Recording(url)
        self.ledger: Ledger | None = None

    async def __call__(self, asked: Asked) -> Deed:
        try:
            reply = await self.recording.reply(asked)
        except aiohttp.ClientError:
            reply = refused(502, "bad gateway")
        if asked.body and reply.status != 200 and self.ledger:
            self.ledger.due[int(asked.prompt[1:])] += 1
        return reply


def server(ground: Ground, kind: str, kills: int) -> Figures:
    """A real vLLM server behind a gateway is killed and restarted; nothing fails."""
    chance = ground.chance(f"server {kind}")
    served = Served(ground)
    gateway = Gateway(served.url)
    with ScriptedServer(gateway) as front:
        run = ground.run_of("kill: vLLM server (real)", ground.place(kind), front, rows=ROWS * kills)
        gateway.ledger = run.ledger
        run.fields = {"model": None, "predict_kwargs": SAMPLING, "retries": 20}
        served.start()
        try:
            job = run.start(ground.jobs)
            kill_server(chance, run, served, kills)
            assert ground.jobs.wait(job) == 0, ground.jobs.log.read_text()[-5000:]
            run.undisturbed(ground.jobs, gateway)
        finally:
            served.kill()
        return run.ledger.check()


def kill_server(chance: random.Random, run: ScriptedRun, served: Served, kills: int) -> None:
    for _ in range(kills):
        moment = progressed(chance, run.ledger, ROWS)
        served.kill()
        run.ledger.fault(moment)
        served.start()


# ---------------------------------------------------------------------- Ray


def on_ray(ground: Ground, kind: str, kills: int, *, real: bool) -> Figures:
    """Two replicas on Ray lose one actor after another; with real engines texts may differ."""
    name = "kill: Ray actor (real)" if real else "kill: Ray actor"
    chance = ground.chance(f"{name} {kind}")
    log = ground.folder / f"host{real}.log"
    rows_a_kill = ROWS if real else ROWS // 2
    ledger = Ledger(
        name,
        ground.place(kind),
        rows_a_kill * kills,
        ground.seed,
        Counter if real else lambda: told_by(log),
        exact=not real,
    )
    own = model_of(ground) if real else {"identifier": "m", "model_name": "m", "vllm_kwargs": {"pause": 0.05}}
    if not real:
        own["vllm_kwargs"]["log"] = f"file:{log}"
    fields = {**own, "db": {"url": ledger.place.url}, "on_ray": True, "replicas": 2, "ray_config": ON_CPU}
    work = "in_flow" if real else "on_scripted_hosts"
    job = ground.jobs.start(fields, "text", "rows", work=work, **CALL)
    stops = 0
    for _ in range(kills):
        moment = progressed(chance, ledger, rows_a_kill, job)
        if not lives(job):
            assert ground.jobs.wait(job) != 0
            stops += 1
            job = ground.jobs.start(fields, "text", "rows", work=work, **CALL)
        victim, before = chance.choice(actors_of(job)), {row["id"] for row in ledger.committed()}
        victim.kill()
        ledger.death(moment, before)
        ledger.spare += IN_ITS_PIPE
    if ground.jobs.wait(job) != 0:
        stops += 1
        ground.jobs.run(fields, "text", "rows", work=work, **CALL)
    assert stops <= kills // TO_STOP, f"the call stopped {stops} times: {ledger.moments}"
    if errors_of(ledger, kills):
        ground.jobs.run(fields, "text", "rows", work=work, retry_failed=True)
    counted = ledger.asked()
    ledger.asked = lambda: counted
    ground.jobs.run(fields, "text", "rows", work=work, predict_id=UNDISTURBED)
    figures = ledger.check()
    return replace(figures, again=None, bound=None) if real else figures


ON_CPU = {"num_gpus": 0, "num_cpus": 1}


def told_by(log: Path) -> Counter[int]:
    """The number of requests for each row, from the logs of the scripted hosts."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(int(line[1:]) for line in lines if re.fullmatch(r"t\d+", line))


def actors_of(job: int) -> list[psutil.Process]:
    """The actors that hold engines or start them, as soon as there are some."""
    until = time.monotonic() + LONG_ENOUGH
    while not (found := list(actors(job))):
        assert time.monotonic() < until, "no actors"
        time.sleep(0.1)
    return found


def actors(job: int) -> Iterator[psutil.Process]:
    for process in psutil.Process(job).children(recursive=True):
        try:
            if re.search("ray::(Host|Scripted)Actor", " ".join(process.cmdline())):
                yield process
        except psutil.Error:
            continue


def lives(job: int) -> bool:
    return psutil.Process(job).status() != psutil.STATUS_ZOMBIE
