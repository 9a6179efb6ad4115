"""A user's side of a server that is shared on this machine: joining it, waiting for it and leaving it.

A folder per configuration holds the files that users and the supervisor share (see `serving.supervisor`),
and `start.lock`. That lock is held while a user joins or leaves, so that no user can join a server that the
last user is leaving.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_tasks.engines import loop
from vllm_tasks.engines.local.gpus import Devices, free_devices
from vllm_tasks.engines.local.model_files import Stamps
from vllm_tasks.engines.local.process import explain, last_words
from vllm_tasks.engines.local.python import environment
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import EngineFailed, InvalidCall
from vllm_tasks.settings import site_settings

logger = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")
SERVER = Path(__file__).with_name("server.py")
CHECK_EVERY = 0.1
"""Seconds between two checks of a server that is starting."""
LOG_EVERY = 10.0
"""Seconds between two log messages about the progress of a start."""
LAST_BYTES = 4096
"""Bytes at the end of the log in which its last line is looked for."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


class SharedServer:
    """A server, identified by the interpreter `python` that runs it and its arguments. `model` names it in
    messages; `start_timeout` is in seconds.

    `gpus` is the number that it needs. If the settings require it, it takes devices that no other engine has.
    `files` are the stamps of the model's files, whose contents the server must have.
    """

    def __init__(
        self,
        model: str,
        python: str,
        arguments: Sequence[str],
        start_timeout: float,
        gpus: int,
        files: Stamps = (),
    ) -> None:
        self.model = model
        self.gpus = gpus
        self.folder = folder_of(python, arguments)
        self._python = python
        self._order = {
            "server": str(SERVER),
            "arguments": arguments,
            "start_timeout": start_timeout,
            "files": [list(stamp) for stamp in files],
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the server. It is started if it does not run, and ends when the last user leaves."""
        self._make_folder()
        with self._open("users") as users:
            begun = False
            try:
                with self._joining_or_leaving(raise_if_stopped):
                    begun = True
                    self._join(users)
                yield
            finally:
                if begun and users in _held:  # else this is a forked child
                    self._leave(users)

    def facts(self) -> dict[str, Any]:
        """Wait until the server is ready; returns its `url` and `key`. Raises `EngineFailed` if it fails, or
        has former contents of the model's files."""
        started, logged = time.monotonic(), 0.0
        while True:
            supervised = self._is_supervised()  # checked first, as it may write its last status and end
            status = self._status()
            if status.get("state") == "ready":
                if status.get("files") != self._order["files"]:
                    raise EngineFailed(
                        f"the vLLM server for {self.model!r} has former contents of the model's files; it "
                        "ends with its other users: run this again then",
                        temporary=True,
                    )
                return status
            if status.get("state") == "failed":
                raise EngineFailed(f"vLLM could not start {self.model!r}: {self._why(status)}")
            if not supervised:
                raise EngineFailed(self._lost(), temporary=True)
            waited = time.monotonic() - started
            if waited - logged >= LOG_EVERY:
                logged = waited
                logger.info("still starting after %.0f s: %s", waited, self._last_words())
            raise_if_stopped()
            time.sleep(CHECK_EVERY)

    def why_ended(self) -> str:
        """Why the server has ended for good; empty while it runs or is being restarted."""
        supervised, status = self._is_supervised(), self._status()
        if status.get("state") == "failed":
            return f"vLLM for {self.model!r} died and could not be restarted: {self._why(status)}"
        return "" if supervised else self._lost()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # raises if the folder belongs to another user
        except OSError as error:
            raise InvalidCall(
                f"the folder {str(self.folder)!r} of a shared server cannot be created: {error}; set "
                "XDG_CACHE_HOME to a folder of this user"
            ) from error

    def _join(self, users: int) -> None:
        with self._open("supervisor") as supervisor:
            fcntl.flock(users, fcntl.LOCK_SH)  # waits for a supervisor that is ending
            if self._is_ending():
                fcntl.flock(supervisor, fcntl.LOCK_EX)
            elif not _is_free(supervisor):
                return
            self._start_supervisor(supervisor)

    def _leave(self, users: int) -> None:
        """Leave. The last user waits until the server has ended, since the next step may need its memory."""
        with self._joining_or_leaving(), self._open("supervisor") as supervisor:
            fcntl.flock(users, fcntl.LOCK_UN)
            if _is_free(users) or not _is_free(users, fcntl.LOCK_SH):  # only the supervisor may have it
                fcntl.flock(users, fcntl.LOCK_UN)
                fcntl.flock(supervisor, fcntl.LOCK_EX)

    def _start_supervisor(self, lock: int) -> None:
        """Start a supervisor that inherits `lock`. So the lock is never free while the supervisor runs."""
        devices = self._devices()
        try:
            self._run_supervisor(devices, lock)
        finally:
            devices.release()  # the supervisor, if it was started, and its server hold them now

    def _run_supervisor(self, devices: Devices, lock: int) -> None:
        locks = [lock, *devices.locks]
        order = {**self._order, "env": dict(devices.env), "locks": locks}
        logger.info("starting a vLLM server for %r; its log is %s", self.model, self._log)
        (self.folder / "server.json").unlink(missing_ok=True)
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".1"))
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as log:
            subprocess.run(  # it forks a process that is not our child, and exits
                [self._python, "-P", str(SUPERVISOR), str(self.folder)],
                input=json.dumps(order).encode(),
                stdout=log,
                stderr=log,
                pass_fds=locks,  # a lock is free only when all processes have closed it
                env=environment(self._python),
                cwd=self.folder,  # the flow's own folder may be removed before the server ends
                start_new_session=True,
                check=False,  # the lock shows whether it runs
            )

    def _devices(self) -> Devices:
        wanted = site_settings().gpus
        if not (wanted and self.gpus):
            return Devices()
        return loop.run(free_devices(max(wanted, self.gpus)), raise_if_stopped)

    def _is_ending(self) -> bool:
        """Whether the last server has failed for good, or its supervisor was killed."""
        status = self._status()
        return status.get("state") == "failed" or bool(
            status and not Path(f"/proc/{status['pids']['supervisor']}").exists()
        )

    def _is_supervised(self) -> bool:
        with self._joining_or_leaving(raise_if_stopped), self._open("supervisor") as supervisor:
            return not _is_free(supervisor)

    def _status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads((self.folder / "server.json").read_text())
        except FileNotFoundError:
            return {}
        return status

    def _why(self, status: dict[str, Any]) -> str:
        words = status["reason"] or explain(status["log"], "", status["code"], more="")
        return f"{words}; its log is {self._log}"

    def _lost(self) -> str:
        return (
            f"the supervisor of the vLLM server for {self.model!r} was ended from outside; the last line of "
            f"its log: {self._last_words()}; its log is {self._log}"
        )

    def _last_words(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - LAST_BYTES))
                return last_words(log.read().decode(errors="replace").splitlines())
        except FileNotFoundError:
            return "(the log was removed)"

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    @contextmanager
    def _joining_or_leaving(self, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold `start.lock`, so that no other user joins, leaves or checks at the same time.

        Another user may hold it for as long as it waits for free GPUs. `stop` is called meanwhile, and raises
        an exception if the wait is to end.
        """
        with self._open("start") as start:
            while not _is_free(start):
                stop()
                time.sleep(CHECK_EVERY)
            yield

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        """Yield the descriptor of a lock file. Closing it at the end releases the lock."""
        lock = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _held.add(lock)
        try:
            yield lock
        finally:
            if lock in _held:  # else this is a forked child, which has closed it
                _held.discard(lock)
                os.close(lock)


def folder_of(python: str, arguments: Sequence[str]) -> Path:
    """The folder of a server: one for each machine, Python environment and configuration of vLLM.

    Machines may share a home folder. vLLM's own environment variables are part of its configuration.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not name.startswith("VLLM_TASKS_") and name != "VLLM_API_KEY"
    }
    named = json.dumps([socket.gethostname(), python, list(arguments), variables], sort_keys=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    return cache / "vllm_tasks" / "servers" / hashlib.sha256(named.encode()).hexdigest()[:16]


def _is_free(lock: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if no other process holds it. Returns whether it was free."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave_to_parent() -> None:
    """Close the inherited locks: a forked child is not a user and must not keep a server running."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
