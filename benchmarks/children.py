"""Processes of the benchmark that answer over a pipe, and end with it.

A child sees the end of the pipe when its parent closes it or dies, however that happens. It leads a
session of its own: Ctrl-C reaches the parent only, and what the child started can be found.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self

from vllm_tasks.engines import session

P = ParamSpec("P")
GRACE = 30.0
"""Seconds for a child to end in order; then its session is killed."""
SHUTDOWN_TIMEOUT = 2.0
"""The same after an interrupt or an error, when it may be in the middle of a run."""
LOG_TAIL = 4000
"""Bytes of a child's log that an error shows."""


class ChildFailed(Exception):
    """A child ended before it answered."""


class Child:
    """`work(pipe, ...)` in a fresh interpreter; `ready` is the first thing that it sends."""

    ready: Any

    def __init__(
        self, work: Callable[Concatenate[Connection, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log")  # noqa: SIM115
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=begin, args=(work, theirs, self._log.name, args, kwargs), name=work.__module__
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        try:
            self.ready = self.receive()
        except BaseException:
            self.close(SHUTDOWN_TIMEOUT)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(GRACE if error is None else SHUTDOWN_TIMEOUT)

    def ask(self, message: object) -> Any:
        """Send a message and wait for its answer; raises `ChildFailed` with the end of the child's log."""
        self.send(message)
        return self.receive()

    def send(self, message: object) -> None:
        """Send a message; `receive` has the answer."""
        self._pipe.send(message)

    def close(self, grace: float) -> None:
        """Close the pipe, and see to it that the child and all of its own end within `grace` seconds."""
        self._pipe.close()
        self._process.join(grace)
        assert self._process.pid is not None
        if self._process.is_alive():
            self._process.kill()
        session.kill(self._process.pid)
        self._process.join()
        self._log.close()

    @property
    def pid(self) -> int:
        """The process at the root of all that the child starts."""
        assert self._process.pid is not None
        return self._process.pid

    def receive(self, timeout: float | None = None) -> Any:
        """What the child sends next; raises TimeoutError after so many seconds without a word."""
        try:
            if not self._pipe.poll(timeout):
                raise TimeoutError(f"{self._process.name} said nothing for {timeout:g} s")
            return self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            tail = Path(self._log.name).read_bytes()[-LOG_TAIL:].decode(errors="replace")
            raise ChildFailed(f"{self._process.name} ended; its last words:\n{tail}") from error


def begin(
    work: Callable[..., None], pipe: Connection, log: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The child's side: own session, output to its log, and no words about the end of the pipe."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin.close()
    try:
        work(pipe, *args, **kwargs)
    except (EOFError, BrokenPipeError):
        return
