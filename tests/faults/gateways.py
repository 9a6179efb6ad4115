"""A gateway between the model and the server is killed and comes back: one of ours, or LiteLLM's proxy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.eventually import LONG_ENOUGH
from tests.faults.ground import IN_FLIGHT, Ground
from tests.faults.kills import APART, all_committed, slowly, somewhere
from tests.faults.ledger import Figures
from tests.servers.ports import free_port
from tests.servers.scripted_server import MODEL, ScriptedServer

AWAY = 1.0
"""Seconds that it is away at most, beyond its start."""
RETRIES = 20
"""So many that no row is given up."""
KEY = "sk-of-the-tests"
"""LiteLLM does not start without one."""


class Gateway:
    """A process at a port of its own, killed and started again at the same one."""

    def __init__(self, folder: Path, server: str, litellm: str = "") -> None:
        """`litellm`: the path of LiteLLM's program; empty: `tests.servers.gateway`."""
        port = f"{free_port()}"
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "gateway.log"
        self._command = [sys.executable, "-m", "tests.servers.gateway", port, server]
        if litellm:
            upstream = {"model": f"text-completion-openai/{MODEL}", "api_base": f"{server}/v1"}
            model = {"model_name": MODEL, "litellm_params": {**upstream, "api_key": "none"}}
            config = folder / "litellm.json"  # JSON is YAML
            config.write_text(json.dumps({"model_list": [model], "general_settings": {"master_key": KEY}}))
            where = ["--host", "127.0.0.1", "--port", port, "--config", str(config)]
            self._command = [litellm, *where, "--telemetry", "False"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once, so that clients have to wait."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, env=os.environ | OFFLINE
            )

    def wait(self) -> None:
        """Wait until it accepts connections."""
        assert self._process is not None
        until = time.monotonic() + LONG_ENOUGH
        port = int(self.url.rpartition(":")[2])
        while True:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < until, "no gateway"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
            except OSError:
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """Kill it with what it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it could not start
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""Else it fetches a list of prices at its start."""


def killed(ground: Ground, kind: str, kills: int, litellm: str = "") -> Figures:
    """Each row that was on its way through the gateway costs one request more, and none fails."""
    name = f"kill: gateway ({named(litellm) if litellm else 'ours'})"
    chance = ground.chance(f"{name} {kind}")
    folder = ground.folder / f"gateway-{'litellm' if litellm else 'ours'}"
    folder.mkdir()
    with ScriptedServer(slowly(chance)) as server, Gateway(folder, server.url, litellm) as gateway:
        run = ground.run_of(name, ground.place(kind), server, rows=2 * APART * (kills + 1))
        run.fields = {"api_url": gateway.url, "retries": RETRIES, "api_key": KEY}
        gateway.wait()
        job = run.start(ground.jobs)
        for _ in range(kills):
            moment = somewhere(chance, run, APART)
            assert not all_committed(run), run.ledger.moments
            gateway.kill()
            run.ledger.fault(moment)
            run.ledger.spare += IN_FLIGHT
            time.sleep(chance.uniform(0, AWAY))
            gateway.start()
            gateway.wait()
        assert ground.jobs.wait(job) == 0, ground.jobs.log.read_text()[-5000:]
        run.undisturbed(ground.jobs, slowly(chance))
        return run.ledger.check()


def named(litellm: str) -> str:
    """LiteLLM with its version."""
    python = Path(litellm).with_name("python")
    ask = "from importlib.metadata import version; print(version('litellm'))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    return f"LiteLLM {told.stdout.strip()}"
