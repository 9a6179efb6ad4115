"""A real Prefect server that can stop and come back at the same port with the same database."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import httpx

from tests.eventually import LONG_ENOUGH
from tests.servers.ports import free_port


class PrefectServer:
    """`home` is its folder, which holds its database. `python`: of its environment, with its version."""

    def __init__(self, home: Path, python: str = sys.executable) -> None:
        home.mkdir()
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.home = home
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it is healthy."""
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [self._python, "-m", "prefect", "server", "start", "--no-ui", *where]
        env = {**os.environ, "PREFECT_HOME": str(self.home), "PREFECT_LOGGING_SERVER_LEVEL": "ERROR"}
        with (self.home / "log").open("a") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + LONG_ENOUGH
        while not self._is_healthy():
            assert self._process.poll() is None, (self.home / "log").read_text()[-2000:]
            assert time.monotonic() < until, "no Prefect server"
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health", timeout=1).is_success
        except httpx.TransportError:
            return False

    def version(self) -> str:
        """The version that it reports."""
        found: str = httpx.get(f"{self.api}/admin/version").raise_for_status().json()
        return found

    def freeze(self) -> None:
        """Make it accept connections and answer none."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)  # its database goes with its folder
            self._wait()
