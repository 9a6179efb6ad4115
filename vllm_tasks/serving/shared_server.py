"""One user's part in a server that all of this machine share: how it is joined, awaited and left.

A folder per configuration holds what users and the supervisor know of each other (see
`serving.supervisor`), and `start.lock`, which is held while somebody joins or leaves: so nobody can
join a server that the last one is just leaving.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_tasks.engines import loop
from vllm_tasks.engines.local.gpus import Devices, free_devices
from vllm_tasks.engines.local.process import explain, last_words
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import EngineFailed, InvalidCall
from vllm_tasks.settings import site_settings

logger = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")
SERVER = Path(__file__).with_name("server.py")
LOOK_EVERY = 0.1
"""Seconds between two looks at a server that starts."""
SAY_EVERY = 10.0
"""Seconds between two lines of start-up progress."""
LAST_BYTES = 4096
"""Of the log, as much as its last words may have."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


class SharedServer:
    """A server by its arguments. `model` is its name in messages, `start_timeout` is in seconds.

    `gpus` are what it needs: where the settings say so, it takes devices that no other engine has.
    """

    def __init__(self, model: str, arguments: Sequence[str], start_timeout: float, gpus: int) -> None:
        self.model = model
        self.gpus = gpus
        self.folder = folder_of(arguments)
        self._order = {"server": str(SERVER), "arguments": arguments, "start_timeout": start_timeout}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the server; it is started if it is not there, and ended by the last one to leave."""
        self._make_folder()
        with self._open("users") as users:
            try:
                self._join(users)
                yield
            finally:
                if users in _held:  # else this is a forked child
                    self._leave(users)

    def facts(self) -> dict[str, Any]:
        """`url` and `key` of the server when it is ready; raises `EngineFailed` when it cannot be."""
        started, said = time.monotonic(), 0.0
        while True:
            kept = self._is_kept()  # asked first: what is told before the end is told
            told = self._told()
            if told.get("state") == "ready":
                return told
            if told.get("state") == "failed":
                raise EngineFailed(f"vLLM could not start {self.model!r}: {self._why(told)}")
            if not kept:
                raise EngineFailed(self._lost(), temporary=True)
            waited = time.monotonic() - started
            if waited - said >= SAY_EVERY:
                said = waited
                logger.info("still starting after %.0f s: %s", waited, self._last_words())
            raise_if_stopped()
            time.sleep(LOOK_EVERY)

    def gave_up(self) -> str:
        """Why there is no server any more; empty while there is one, or one is being started."""
        kept, told = self._is_kept(), self._told()
        if told.get("state") == "failed":
            return f"vLLM for {self.model!r} died and could not be started again: {self._why(told)}"
        return "" if kept else self._lost()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # refused where it is another user's
        except OSError as error:
            raise InvalidCall(
                f"the folder {str(self.folder)!r} of a shared server cannot be made: {error}; name one of "
                "this user's own in XDG_CACHE_HOME"
            ) from error

    def _join(self, users: int) -> None:
        with self._deciding(), self._open("supervisor") as supervisor:
            fcntl.flock(users, fcntl.LOCK_SH)  # waits for a supervisor that is ending
            if self._is_ending():
                fcntl.flock(supervisor, fcntl.LOCK_EX)
            elif not _is_free(supervisor):
                return
            self._start_supervisor(supervisor)

    def _leave(self, users: int) -> None:
        """Let go; the last one waits until the server is gone, whose memory the next step may need."""
        with self._deciding(), self._open("supervisor") as supervisor:
            fcntl.flock(users, fcntl.LOCK_UN)
            if _is_free(users) or not _is_free(users, fcntl.LOCK_SH):  # nobody, or the supervisor, has it
                fcntl.flock(users, fcntl.LOCK_UN)
                fcntl.flock(supervisor, fcntl.LOCK_EX)

    def _start_supervisor(self, lock: int) -> None:
        """Start a supervisor that inherits `lock`, so that it is never free while the supervisor lives."""
        devices = self._devices()
        try:
            self._run_supervisor(devices, lock)
        finally:
            devices.release()  # the supervisor and its server hold them now, if they were started

    def _run_supervisor(self, devices: Devices, lock: int) -> None:
        locks = [lock, *devices.locks]
        order = {**self._order, "env": dict(devices.env), "locks": locks}
        logger.info("starting a vLLM server for %r; its log: %s", self.model, self._log)
        (self.folder / "server.json").unlink(missing_ok=True)
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".1"))
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as log:
            subprocess.run(  # it leaves a process that is not our child
                [sys.executable, "-P", str(SUPERVISOR), str(self.folder)],
                input=json.dumps(order).encode(),
                stdout=log,
                stderr=log,
                pass_fds=locks,
                cwd=self.folder,  # the flow's own may be gone before the server
                start_new_session=True,
                check=False,  # whether it lives is seen from the lock
            )

    def _devices(self) -> Devices:
        wanted = site_settings().gpus
        return loop.run(free_devices(max(wanted, self.gpus))) if wanted and self.gpus else Devices()

    def _is_ending(self) -> bool:
        """Whether the last server that was told of is given up, or its supervisor was killed."""
        told = self._told()
        return told.get("state") == "failed" or bool(
            told and not Path(f"/proc/{told['pids']['supervisor']}").exists()
        )

    def _is_kept(self) -> bool:
        with self._deciding(), self._open("supervisor") as supervisor:
            return not _is_free(supervisor)

    def _told(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads((self.folder / "server.json").read_text())
        except FileNotFoundError:
            return {}
        return told

    def _why(self, told: dict[str, Any]) -> str:
        words = told["reason"] or explain(told["log"], "", told["code"], more="")
        return f"{words}; its log: {self._log}"

    def _lost(self) -> str:
        return (
            f"the process that kept the vLLM server for {self.model!r} was ended from outside; its last "
            f"words: {self._last_words()}; its log: {self._log}"
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
    def _deciding(self) -> Iterator[None]:
        """While nobody else joins, leaves or looks."""
        with self._open("start") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        """The descriptor of a lock's file; what it holds is let go at the end."""
        lock = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _held.add(lock)
        try:
            yield lock
        finally:
            if lock in _held:  # else this is a forked child, where it is closed
                _held.discard(lock)
                os.close(lock)


def folder_of(arguments: Sequence[str]) -> Path:
    """The folder of a server: one for each machine, Python, and configuration of vLLM.

    A home may be shared by machines. vLLM's own environment variables configure it, too.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not name.startswith("VLLM_TASKS_") and name != "VLLM_API_KEY"
    }
    named = json.dumps([socket.gethostname(), sys.prefix, list(arguments), environment], sort_keys=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    return cache / "vllm_tasks" / "servers" / hashlib.sha256(named.encode()).hexdigest()[:16]


def _is_free(lock: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if nobody is in the way."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave_to_parent() -> None:
    """A forked child of ours is no user: it must not hold a server that we have left."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
