"""The child process that holds an engine: its start, frames, log and end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import subprocess
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vllm_tasks.engines import session
from vllm_tasks.engines.local.gpus import Devices
from vllm_tasks.engines.local.python import environment, interpreter
from vllm_tasks.engines.session import Frame
from vllm_tasks.errors import EngineFailed

logger = logging.getLogger(__name__)
vllm_logger = logging.getLogger("vllm_tasks.vllm")

T = TypeVar("T")

ANY_DEVICES = Devices()
HOST = Path(__file__).with_name("host.py")
LOG_EVERY = 10.0
"""Seconds between two log messages about the progress of a start."""
CLOSE_GRACE = 15.0
"""Seconds for an orderly shutdown of the engine, after which it is killed."""
KILL_GRACE = 30.0
"""Seconds that a killed process is waited for. Inside a driver it ends only when the driver lets it."""
LOG_GRACE = 2.0
"""Seconds to read the rest of the log after the process has ended."""
LOG_LINES = 400
"""Lines of the engine's log that are kept to explain a failure."""
LONGEST_LINE = 2**20
"""Bytes of the longest line of the log that is kept; longer ones are dropped."""
REASON = re.compile(r"\b((?:[\w.]+\.)?\w*(?:Error|Exception|OutOfMemory\w*): .+)")
"""The last line of a traceback: an exception and its message."""
DIED = re.compile(r"(Worker proc \S+) died unexpectedly \(exit code: -(\d+)\)")
"""A line that reports that a signal ended one of vLLM's processes."""
WRAPPERS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
)
"""Errors of vLLM that only refer to another one in the log."""
FIRST, NEWEST = 0, -1
"""The error that explains a failure: for a start the first, which causes the others, else the newest."""
OLDEST, LATEST = (0, 26), (0, 33)
"""The versions of vLLM that the host is written for."""
MORE = " (the logger vllm_tasks.vllm has all of them at level DEBUG)"


class HostProcess:
    """A running host (see `vllm_tasks.engines.local.host`) and this process's end of its socket."""

    def __init__(
        self,
        model: str,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        sockets: str,
    ) -> None:
        self.model = model
        self._process = process
        self._reader = reader
        self._writer = writer
        self._sockets = sockets
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._log_reader = asyncio.create_task(self._read_log())
        self._code: int | None = None  # exit code, if it ended before it was killed

    @classmethod
    async def launch(
        cls,
        arguments: Frame,
        timeout: float,  # noqa: ASYNC109
        python: str = "",
        devices: Devices = ANY_DEVICES,
    ) -> tuple[HostProcess, Frame]:
        """Start a host. Returns it when its engine is ready, with the facts that the engine reports.

        `timeout` is in seconds. `python` is the interpreter that has vLLM; empty: this process's. The engine
        sees only `devices`, and holds them too.
        Raises `EngineFailed` with vLLM's own reason; no process remains then.
        """
        started = time.monotonic()
        host = await cls._spawn(str(arguments["model"]), interpreter(python), devices)
        logger.info("starting vLLM for %r (pid %d)", host.model, host._process.pid)
        try:
            host.write(arguments)
            facts = await host._ready(timeout)
        except BaseException:
            await host.end(grace=0)
            raise
        host._log.clear()  # later lines explain a death, not the start
        warn_of_version(facts["vllm"])
        logger.info(
            "vLLM %s is ready for %r after %.1f s: max_num_seqs=%d, max_model_len=%d",
            facts["vllm"],
            host.model,
            time.monotonic() - started,
            facts["max_num_seqs"],
            facts["max_model_len"],
        )
        return host, facts

    @classmethod
    async def _spawn(cls, model: str, python: str, devices: Devices) -> HostProcess:
        ours, theirs = socket.socketpair()
        sockets = ""
        with theirs:
            streams = await asyncio.open_connection(sock=ours)  # no await from here on, so no cancellation
            try:
                sockets = session.new_sockets()
                process = subprocess.Popen(  # noqa: ASYNC220 - takes milliseconds; must not be orphaned
                    # -P: Python must not import from the folder of host.py, whose names hide other modules.
                    [python, "-P", str(HOST), str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno(), *devices.locks],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={
                        **environment(python),
                        "PYTHONUNBUFFERED": "1",
                        session.SOCKETS: sockets,
                        **devices.env,
                    },
                )
            except OSError as error:  # no memory, or too many processes or open files
                streams[1].close()
                session.remove_sockets(sockets)
                raise EngineFailed(f"vLLM's process cannot start: {error}", temporary=True) from error
        return cls(model, process, *streams, sockets)

    async def _ready(self, timeout: float) -> Frame:  # noqa: ASYNC109
        """Wait for the engine and return its facts. Logs the progress of the start every few seconds."""

        def report(waited: float) -> None:
            logger.info("still starting after %.0f s: %s", waited, last_words(self._log))

        try:
            frame = await within(timeout, self.read(), report)
        except TimeoutError:
            raise EngineFailed(
                f"vLLM did not start {self.model!r} within {timeout:g} s "
                f"(VLLM_TASKS_ENGINE_START_TIMEOUT); its last words: {last_words(self._log)}"
            ) from None
        if "ready" in frame:
            facts: Frame = frame["ready"]
            return facts
        await self.end()
        why = self.why(str(frame.get("failed", "")), FIRST)
        raise EngineFailed(f"vLLM could not start {self.model!r}: {why}")

    async def read(self) -> Frame:
        """Wait for the next frame; it is empty if the host has ended."""
        try:
            return await session.read_frame(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return {}

    def write(self, frame: Frame) -> None:
        """Send a frame. It is dropped if the host has ended."""
        if not self._writer.is_closing():
            self._writer.write(session.packed(frame))

    def why(self, reason: str, which: int = NEWEST) -> str:
        """Why it ended: vLLM's own reason, or the signal or error in the log that the reason refers to."""
        if reason and not any(wrapper in reason for wrapper in WRAPPERS):
            return reason
        return explain(self._log, reason, self._code, which)

    async def end(self, grace: float = CLOSE_GRACE) -> None:
        """End the host: orderly, by force after `grace` seconds, or by force immediately when cancelled.

        It polls, because a thread to wait in cannot be started while the interpreter exits.
        """
        if not self._writer.is_closing():  # else uvloop, in Ray's actors, would raise
            self._writer.write_eof()  # the request to end; works even if a forked child has a copy
        self._writer.close()
        deadline = time.monotonic() + grace
        try:
            while self._process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        finally:  # without an await, so that a second cancellation cannot leave processes behind
            self._code = self._process.poll()
            self._process.kill()
            session.kill(self._process.pid)  # its own session, so never this process's
            with suppress(subprocess.TimeoutExpired):  # all engines of this process wait meanwhile
                self._process.wait(KILL_GRACE)
            session.remove_sockets(self._sockets)
        await asyncio.wait({self._log_reader}, timeout=LOG_GRACE)
        self._log_reader.cancel()  # if a spared process still holds the log open
        await asyncio.wait({self._log_reader})

    async def _read_log(self) -> None:
        """Keep the last lines that vLLM prints, and log each one at level DEBUG."""
        reader = asyncio.StreamReader(limit=LONGEST_LINE)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while True:
                try:
                    raw = await reader.readline()
                except ValueError:  # too long: dropped, but read, or vLLM would block on a full pipe
                    continue
                if not raw:
                    return
                line = raw.decode(errors="replace").rstrip()
                self._log.append(line)
                vllm_logger.debug("%s", line)
        finally:
            transport.close()


def warn_of_version(version: str) -> None:
    """Warn of a vLLM that the host was not written for. It may work, and its own errors will show if not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and not OLDEST <= (int(found[1]), int(found[2])) <= LATEST:
        oldest, newest = (".".join(map(str, each)) for each in (OLDEST, LATEST))
        logger.warning("vLLM %s is untested: this package is written for %s to %s", version, oldest, newest)


async def within(seconds: float, awaited: Awaitable[T], report: Callable[[float], None]) -> T:
    """Wait up to `seconds`, else raise `TimeoutError`. `report` is called regularly with the time waited."""
    coming, started = asyncio.ensure_future(awaited), time.monotonic()
    try:
        while (waited := time.monotonic() - started) < seconds:
            if (await asyncio.wait({coming}, timeout=min(LOG_EVERY, seconds - waited)))[0]:
                return coming.result()
            report(time.monotonic() - started)
        raise TimeoutError
    finally:
        coming.cancel()


def explain(log: Sequence[str], reason: str, code: int | None, which: int = FIRST, more: str = MORE) -> str:
    """Explain an end: by its signal, an error of a traceback in the log, or the last line and the exit code.

    `which` chooses among errors, `FIRST` or `NEWEST`. `more` is appended, to say where the complete log is.
    """
    start = next((i for i, line in enumerate(log) if "Traceback (most recent call last)" in line), len(log))
    found = [_words_at(log, i) for i in range(start, len(log)) if REASON.search(log[i])]
    causes = [words for words in found if not any(wrapper in words for wrapper in WRAPPERS)]
    words = f"; its last words: {last_words(log)}{more}"
    if code is not None and code < 0:
        return f"its process was ended by {session.signal_words(-code)}{words}"
    if died := [match for line in log if (match := DIED.search(line))]:
        return f"{died[which][1]} was ended by {session.signal_words(int(died[which][2]))}"
    if causes:
        return causes[which]
    return f"{reason or 'its process ended'}, exit code {code}{words}"


def _words_at(log: Sequence[str], i: int) -> str:
    """The exception in line `i`. The message of a pydantic error is on the next line."""
    found = REASON.search(log[i])
    assert found is not None
    if "validation error" in found[1] and i + 1 < len(log):
        return f"{found[1]}: {log[i + 1].partition(' [type=')[0].strip()}"
    return found[1]


def last_words(log: Sequence[str]) -> str:
    return next((line for line in reversed(log) if line.strip()), "(nothing printed)")
