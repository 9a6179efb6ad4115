"""Child processes of the benchmark, which respond over a pipe and end with it.

A child sees the end of the pipe when its parent closes it or dies, even by `kill -9`. It leads a session of
its own: Ctrl-C reaches only the parent, and all processes that the child started can be found and killed.
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
"""Seconds in which a child may end by itself; then its session is killed."""
SHUTDOWN_TIMEOUT = 2.0
"""The same after an interrupt or an error, when the child may be in the middle of a run."""
LOG_TAIL = 4000
"""Bytes of a child's log that an error shows."""


class ChildFailed(Exception):
    """A child ended before it responded."""


class Child:
    """`work(pipe, ...)` in a fresh interpreter; `ready` is its first message."""

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

    def request(self, message: object) -> Any:
        """Send a message and wait for the response; raises `ChildFailed` with the end of the child's log."""
        self.send(message)
        return self.receive()

    def send(self, message: object) -> None:
        """Send a message; `receive` returns the response."""
        self._pipe.send(message)

    def close(self, grace: float) -> None:
        """Close the pipe; after `grace` seconds, SIGKILL the child and every process of its session."""
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
        """PID of the child, the root of all processes that it starts."""
        assert self._process.pid is not None
        return self._process.pid

    def receive(self, timeout: float | None = None) -> Any:
        """The child's next message; raises TimeoutError after `timeout` seconds without one."""
        try:
            if not self._pipe.poll(timeout):
                raise TimeoutError(f"{self._process.name} sent nothing for {timeout:g} s")
            return self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            tail = Path(self._log.name).read_bytes()[-LOG_TAIL:].decode(errors="replace")
            raise ChildFailed(f"{self._process.name} ended; the end of its log:\n{tail}") from error


def begin(
    work: Callable[..., None], pipe: Connection, log: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The child's side: a session of its own, output to its log, and no error at the end of the pipe."""
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
