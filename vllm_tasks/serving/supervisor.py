"""The process that keeps one vLLM server for as long as somebody uses it, started by `serving.api`.

Run by its path, with the standard library alone (see `vllm_tasks.engines.session`): the server's folder is
its argument, its order comes as JSON on standard input, and what it prints is the server's log. It leaves
its parent and its session, so that no user's end is its own. In the folder:

    supervisor.lock   held exclusively as long as this process or its server lives; inherited from the
                      starter, and by the server, so that no second one starts beside that of a
                      supervisor that was killed
    users.lock        shared by the users; who can have it exclusively knows that there is none
    server.json       what users need to know: state (starting, ready, failed), url, key, pids; or why
                      it failed
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "engines/session.py")))

logger = logging.getLogger("supervisor")

ADDRESS = "127.0.0.1"
TICK = 0.5
"""Seconds between two looks at the users and at the server's process."""
HEALTH_EVERY = 5.0
HEALTH_TIMEOUT = 5.0
MISSES = 12
"""Health checks in a row without the answer that all is well, after which a server counts as dead."""
STARTS = 3
"""A server that was well once is given up after so many starts in a row that did not make it well."""
END_GRACE = 10.0
"""Seconds for an orderly end of the server; then its session is killed."""
LOG_BYTES = 32 * 2**20
"""A log larger than this becomes `log.1`, in place of the one before."""
LOG_LINES = 400
"""Lines of the log that explain a failure."""


class Unused(Exception):
    """Nobody uses the server any more."""


class Supervisor:
    """One server on one port with one key, through all its lives."""

    def __init__(self, folder: Path, order: dict[str, Any]) -> None:
        self.folder = folder
        self.log = Path("/proc/self/fd/1")  # which may be removed from the folder
        self.order = order
        self.key = secrets.token_urlsafe(32)
        self.port_held = hold_port()
        self.port: int = self.port_held.getsockname()[1]
        self.users = os.open(folder / "users.lock", os.O_RDWR | os.O_CLOEXEC)
        self.server: subprocess.Popen[bytes] | None = None
        self.sockets = ""
        self.log_begin = 0
        self.failed = False

    def keep(self) -> None:
        """Keep the server running until nobody uses it, or it can no longer be started.

        A first start that fails is not repeated: it would fail again, and somebody waits for the reason.
        """
        starts_left = 1
        while starts_left:
            self.tell("starting")
            failure = self.start()
            if failure is None:
                starts_left = STARTS
                self.tell("ready")
                self.watch()
            else:
                starts_left -= 1
            if starts_left:  # else the log ends with the server's own words
                code = self.server and self.server.poll()
                logger.warning("the server is gone (exit code %s); starting it again", code)
            self.end(grace=0)
        assert failure is not None
        self.give_up(*failure)

    def start(self) -> tuple[int | None, str] | None:
        """Start the server and wait until it is well; else its exit code, or another reason."""
        self.log_begin = self.log.stat().st_size
        timeout = self.order["start_timeout"]
        deadline = time.monotonic() + timeout
        self.server = self.launch()
        while time.monotonic() < deadline:
            self.tick()
            if (code := self.server.poll()) is not None:
                return code, ""
            if self.is_well():
                return None
        return None, f"it was not ready within {timeout:g} s (VLLM_TASKS_ENGINE_START_TIMEOUT)"

    def launch(self) -> subprocess.Popen[bytes]:
        self.sockets = session.new_sockets()
        # -P: the folder of server.py must not be searched for modules (it has names of others).
        server = subprocess.Popen(
            [sys.executable, "-P", self.order["server"], str(os.getpid())],
            stdin=subprocess.PIPE,
            pass_fds=self.order["locks"],  # the supervisor's, and those of its GPUs
            start_new_session=True,
            env={
                **os.environ,
                **self.order["env"],
                "VLLM_API_KEY": self.key,
                "PYTHONUNBUFFERED": "1",
                session.SOCKETS: self.sockets,
            },
        )
        assert server.stdin is not None
        arguments = [*self.order["arguments"], f"--host={ADDRESS}", f"--port={self.port}"]
        with suppress(BrokenPipeError), server.stdin as stdin:
            stdin.write(json.dumps(arguments).encode())
        return server

    def watch(self) -> None:
        """Return when the server is dead, or does not say any more that it is well."""
        assert self.server is not None
        misses, due = 0, time.monotonic() + HEALTH_EVERY
        while self.server.poll() is None and misses < MISSES:
            self.tick()
            if time.monotonic() >= due:
                misses = 0 if self.is_well() else misses + 1
                due = time.monotonic() + HEALTH_EVERY

    def is_well(self) -> bool:
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=HEALTH_TIMEOUT)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tick(self) -> None:
        """Wait a little; raises `Unused` when no user is left. None can come then: the lock is kept."""
        time.sleep(TICK)
        self.bound_log()
        with suppress(BlockingIOError):
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise Unused

    def bound_log(self) -> None:
        if self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.folder / "log.1")
            os.truncate(self.log, 0)  # whoever writes appends
            self.log_begin = 0

    def give_up(self, code: int | None, reason: str) -> None:
        self.failed = True
        with self.log.open(errors="replace") as log:
            log.seek(self.log_begin)
            words = [line.rstrip() for line in deque(log, LOG_LINES)]
        self.write({"state": "failed", "code": code, "reason": reason, "log": words})

    def end(self, grace: float) -> None:
        """End the server and all that it started: in order, after `grace` seconds by force."""
        if self.server is None:
            return
        if grace:
            self.server.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.server.wait(grace)
        self.server.kill()
        session.kill(self.server.pid)
        self.server.wait()
        session.remove_sockets(self.sockets)
        self.server = None

    def tell(self, state: str) -> None:
        url = f"http://{ADDRESS}:{self.port}"
        pids = {"supervisor": os.getpid(), "server": self.server and self.server.pid}
        self.write({"state": state, "url": url, "key": self.key, "pids": pids})

    def write(self, told: dict[str, Any]) -> None:
        """Replace server.json as a whole, readable by this user alone."""
        new = self.folder / "server.json.new"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(told, file)
        new.replace(self.folder / "server.json")

    def close(self) -> None:
        """End the server and take its key away; the locks go with this process."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.end(END_GRACE)
        if not self.failed:
            (self.folder / "server.json").unlink(missing_ok=True)


def hold_port() -> socket.socket:
    """A free port that stays ours while no server listens on it.

    vLLM binds with SO_REUSEADDR, and Linux lets sockets that all have it share a port until one listens.
    """
    held = socket.socket()
    held.bind((ADDRESS, 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: this port was nobody's
    return held


def main() -> None:
    folder, order = Path(sys.argv[1]), json.load(sys.stdin)
    if os.fork():
        os._exit(0)  # whoever started us waits for this, and has no child then
    logging.basicConfig(format="%(asctime)s supervisor: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    supervisor = Supervisor(folder, order)
    try:
        supervisor.keep()
    except Unused:
        logger.info("nobody uses the server any more; ending it")
    finally:
        supervisor.close()


if __name__ == "__main__":
    main()
