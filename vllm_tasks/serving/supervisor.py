"""The process that keeps one vLLM server running while anybody uses it, started by `serving.api`.

It is run by path and uses the standard library only (see `vllm_tasks.engines.session`). Its argument is the
server's folder, its order arrives as JSON on standard input, and its output is the server's log. It leaves
its parent and its session, so it does not end with any user. The folder contains:

    supervisor.lock   held exclusively while this process or its server runs. It is inherited from the
                      starter, and by the server, so that no second server starts beside one whose
                      supervisor was killed
    users.lock        held shared by each user. Whoever can lock it exclusively knows that no user is left
    server.json       the status for users: state (starting, ready, failed), url, key, pids, files; or
                      why it failed
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
"""Seconds between two checks of the users and of the server's process."""
HEALTH_EVERY = 5.0
HEALTH_TIMEOUT = 5.0
MISSES = 12
"""Failed health checks in a row after which a server counts as dead."""
STARTS = 3
"""Failed starts in a row after which a server that was healthy before is not restarted any more."""
END_GRACE = 10.0
"""Seconds for an orderly shutdown of the server, after which its session is killed."""
LOG_BYTES = 32 * 2**20
"""Size in bytes above which the log is moved to `log.1`, which it replaces."""
LOG_LINES = 400
"""Lines of the log that are kept to explain a failure."""


class Unused(Exception):
    """No user of the server is left."""


class Supervisor:
    """Runs one server on one port with one key, and restarts it when it dies."""

    def __init__(self, folder: Path, order: dict[str, Any]) -> None:
        self.folder = folder
        self.log = Path("/proc/self/fd/1")  # because the file may be removed from the folder
        self.order = order
        self.key = secrets.token_urlsafe(32)
        self.port_held = hold_port()
        self.port: int = self.port_held.getsockname()[1]
        self.users = os.open(folder / "users.lock", os.O_RDWR | os.O_CLOEXEC)
        self.server: subprocess.Popen[bytes] | None = None
        self.sockets = ""
        self.log_begin = 0
        self.failed = False

    def supervise(self) -> None:
        """Keep the server running until no user is left, or it cannot be restarted.

        A failed first start is not repeated: it would fail again, and a user is waiting for the reason. After
        a change of the model's files, none is restarted: rows of one run would be answered by two models.
        """
        starts_left = 1
        while starts_left:
            self.report("starting")
            failure = self.start()
            if failure is None:
                starts_left = STARTS
                self.report("ready")
                self.watch()
            else:
                starts_left -= 1
            if starts_left and self.has_other_files():
                failure, starts_left = (None, "files of the model have changed since it was started"), 0
            if starts_left:  # else the log must end with the server's own output
                code = self.server and self.server.poll()
                logger.warning("the server has ended (exit code %s); restarting it", code)
            self.end(grace=0)
        assert failure is not None
        self.give_up(*failure)

    def has_other_files(self) -> bool:
        """Whether files of the model are not those that the server was started with."""
        with suppress(OSError):  # one is gone
            found = [(path, os.stat(path)) for path, *_ in self.order["files"]]
            return bool([[path, s.st_size, s.st_mtime_ns] for path, s in found] != self.order["files"])
        return True

    def start(self) -> tuple[int | None, str] | None:
        """Start the server and wait until it is healthy. If it fails, returns its exit code or a reason."""
        self.log_begin = self.log.stat().st_size
        timeout = self.order["start_timeout"]
        deadline = time.monotonic() + timeout
        self.server = self.launch()
        while time.monotonic() < deadline:
            self.tick()
            if (code := self.server.poll()) is not None:
                return code, ""
            if self.is_healthy():
                return None
        return None, f"it was not ready within {timeout:g} s (VLLM_TASKS_ENGINE_START_TIMEOUT)"

    def launch(self) -> subprocess.Popen[bytes]:
        self.sockets = session.new_sockets()
        # -P: Python must not import from the folder of server.py, whose names hide other modules.
        server = subprocess.Popen(
            [sys.executable, "-P", self.order["server"], str(os.getpid())],
            stdin=subprocess.PIPE,
            pass_fds=self.order["locks"],  # that of the supervisor, and those of its GPUs
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
        """Return when the server has ended, or has failed too many health checks."""
        assert self.server is not None
        misses, due = 0, time.monotonic() + HEALTH_EVERY
        while self.server.poll() is None and misses < MISSES:
            self.tick()
            if time.monotonic() >= due:
                misses = 0 if self.is_healthy() else misses + 1
                due = time.monotonic() + HEALTH_EVERY

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=HEALTH_TIMEOUT)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tick(self) -> None:
        """Wait a little. Raises `Unused` if no user is left, and keeps the lock so that none can join."""
        time.sleep(TICK)
        self.bound_log()
        with suppress(BlockingIOError):
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise Unused

    def bound_log(self) -> None:
        if self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.folder / "log.1")
            os.truncate(self.log, 0)  # safe because every writer appends
            self.log_begin = 0

    def give_up(self, code: int | None, reason: str) -> None:
        self.failed = True
        with self.log.open(errors="replace") as log:
            log.seek(self.log_begin)
            words = [line.rstrip() for line in deque(log, LOG_LINES)]
        self.write({"state": "failed", "code": code, "reason": reason, "log": words})

    def end(self, grace: float) -> None:
        """End the server and all that it started: orderly, or by force after `grace` seconds."""
        if self.server is None:
            return
        if grace:
            self.server.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.server.wait(grace)
        self.server.kill()
        session.kill(self.server.pid)  # its own session, so never this process's
        self.server.wait()
        session.remove_sockets(self.sockets)
        self.server = None

    def report(self, state: str) -> None:
        url = f"http://{ADDRESS}:{self.port}"
        pids = {"supervisor": os.getpid(), "server": self.server and self.server.pid}
        files = self.order["files"]
        self.write({"state": state, "url": url, "key": self.key, "pids": pids, "files": files})

    def write(self, status: dict[str, Any]) -> None:
        """Replace server.json atomically, readable by this user only because it holds the key."""
        new = self.folder / "server.json.new"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(status, file)
        new.replace(self.folder / "server.json")

    def close(self) -> None:
        """End the server and remove its key. The locks are released when this process ends."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt this
        self.end(END_GRACE)
        if not self.failed:
            (self.folder / "server.json").unlink(missing_ok=True)


def hold_port() -> socket.socket:
    """Bind a free port, which stays reserved while no server listens on it.

    vLLM binds with SO_REUSEADDR. Linux lets sockets that all have this option share a port until one listens.
    """
    held = socket.socket()
    held.bind((ADDRESS, 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only now: bind found an unshared port
    return held


def main() -> None:
    folder, order = Path(sys.argv[1]), json.load(sys.stdin)
    if os.fork():
        os._exit(0)  # the starter waits for this exit only, and has no child afterwards
    logging.basicConfig(format="%(asctime)s supervisor: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    supervisor = Supervisor(folder, order)
    try:
        supervisor.supervise()
    except Unused:
        logger.info("no user of the server is left; ending it")
    finally:
        supervisor.close()


if __name__ == "__main__":
    main()
