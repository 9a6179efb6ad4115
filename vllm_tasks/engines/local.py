"""vLLM in a process of ours: started here, watched, restarted once an incident, ended with us."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_tasks.engines import Done
from vllm_tasks.engines.host import Frame, kill_session, read_frame
from vllm_tasks.errors import EngineFailed
from vllm_tasks.rows import Choice, Completion, Request, Result, RowError, TokenLogprob
from vllm_tasks.window import Window

logger = logging.getLogger(__name__)
vllm_logger = logging.getLogger("vllm_tasks.vllm")

HOST = Path(__file__).with_name("host.py")
WINDOW_FACTOR = 1.1
"""Rows in flight per row that vLLM runs at once: the surplus waits in vLLM, so that no place is empty."""
BARREN_LIVES = 3
"""An engine that died so many times in a row without an answer is not started again."""
DEATHS_OF_A_ROW = 2
"""A row that was unfinished at so many deaths of its engine is given up."""
SAY_EVERY = 10.0
"""Seconds between two lines of start-up progress."""
CLOSE_GRACE = 15.0
"""Seconds for an orderly end of the engine; then it is killed."""
LOG_LINES = 400
"""Lines of the engine's log kept to explain a failure."""
REASON = re.compile(r"\b((?:[\w.]+\.)?\w*(?:Error|Exception|OutOfMemory\w*): .+)")
"""A line that ends a traceback: an exception and its words."""
WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed")
"""vLLM's errors that only point at another one in the log."""


@dataclass(frozen=True)
class LocalConfig:
    """vLLM's engine arguments, as JSON; equal configurations share an engine."""

    engine_args: str
    start_timeout: float

    @property
    def model(self) -> str:
        return str(json.loads(self.engine_args)["model"])


@dataclass(eq=False)
class Chunk:
    """The rows of one `generate` call: how many are open, and a future for the last of them."""

    done: Done
    open: int
    finished: asyncio.Future[None]

    def settle(self, index: int, result: Result) -> None:
        self.done(index, result)
        self.open -= 1
        if self.open == 0 and not self.finished.done():
            self.finished.set_result(None)


@dataclass(slots=True)
class OpenRow:
    """A row that has been handed over and is not answered yet."""

    chunk: Chunk
    index: int
    request: Request
    deaths: int = 0

    def settle(self, result: Result) -> None:
        self.chunk.settle(self.index, result)


class LocalEngine:
    """An `Engine` in a child process that holds a vLLM `AsyncLLM`."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config
        self.window = Window(1)  # set when the engine has told its size
        self._ids = itertools.count()
        self._open: dict[int, OpenRow] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.Task[None] | None = None
        self._log_reader: asyncio.Task[None] | None = None
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._failed: EngineFailed | None = None
        self._closing = False
        self._answered = 0

    async def start(self) -> None:
        self._failed, self._closing = None, False
        reader, facts = await self._launch()
        self.window.limit = math.ceil(WINDOW_FACTOR * facts["max_num_seqs"])
        self._watch = asyncio.create_task(self._run(reader))

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        if self._failed:
            raise self._failed
        chunk = Chunk(done, len(requests), asyncio.get_running_loop().create_future())
        mine = {next(self._ids): OpenRow(chunk, i, request) for i, request in enumerate(requests)}
        self._open |= mine
        try:
            self._send(mine)
            await chunk.finished
        finally:
            left = [row for row in mine if self._open.pop(row, None)]
            if left:
                self._write({"cancel": left})

    async def close(self) -> None:
        self._closing = True
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it hung up before us
                self._channel.shutdown(socket.SHUT_RDWR)  # the host takes this for its order to end
        if self._process is not None:
            await end(self._process)
        # Both end by themselves now that the process has ended.
        await asyncio.gather(*(t for t in (self._watch, self._log_reader) if t), return_exceptions=True)

    # ------------------------------------------------------------------ the process

    async def _launch(self) -> tuple[asyncio.StreamReader, Frame]:
        """Start a host and wait until its engine is ready."""
        started = time.monotonic()
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - takes milliseconds, and must end with us
                # -P: the folder of host.py must not be searched for modules (it holds an `http.py`).
                [sys.executable, "-P", str(HOST), str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        logger.info("starting vLLM for %r (pid %d)", self.config.model, self._process.pid)
        self._log.clear()
        self._answered = 0
        self._log_reader = asyncio.create_task(self._read_log(self._process))
        reader, self._writer = await asyncio.open_connection(sock=self._channel)
        self._write(json.loads(self.config.engine_args))
        try:
            answer = await self._first_frame(reader, started)
        except BaseException:
            self._writer.close()
            kill_session(self._process.pid)
            raise
        if "failed" in answer:
            self._writer.close()
            await end(self._process)
            await self._log_reader
            raise EngineFailed(self._explain(answer["failed"]))
        facts: Frame = answer["ready"]
        logger.info(
            "vLLM %s is ready for %r after %.1f s: max_num_seqs=%d, max_model_len=%d",
            *(facts["vllm"], self.config.model, time.monotonic() - started),
            *(facts["max_num_seqs"], facts["max_model_len"]),
        )
        return reader, facts

    async def _first_frame(self, reader: asyncio.StreamReader, started: float) -> Frame:
        """`ready` or `failed`; says every few seconds how far the start-up is."""
        frame = asyncio.ensure_future(read_frame(reader))
        while not frame.done():
            await asyncio.wait({frame}, timeout=SAY_EVERY)
            waited = time.monotonic() - started
            if not frame.done():
                if waited > self.config.start_timeout:
                    frame.cancel()
                    raise EngineFailed(
                        f"vLLM did not start {self.config.model!r} within {self.config.start_timeout:g} s "
                        "(VLLM_TASKS_ENGINE_START_TIMEOUT); its last words: " + self._last_words()
                    )
                logger.info("still starting after %.0f s: %s", waited, self._last_words())
        try:
            return frame.result()
        except (asyncio.IncompleteReadError, ConnectionError):
            return {"failed": "the engine's process ended while it started"}

    async def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        """Keep the end of what vLLM prints, and pass it on at level DEBUG."""
        assert process.stdout is not None
        reader = asyncio.StreamReader(limit=2**20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), process.stdout
        )
        async for raw in reader:
            line = raw.decode(errors="replace").rstrip()
            self._log.append(line)
            vllm_logger.debug("%s", line)

    def _last_words(self) -> str:
        return next((line for line in reversed(self._log) if line.strip()), "(nothing printed yet)")

    def _explain(self, reason: str) -> str:
        """vLLM's own reason: the error in its log that its wrapper only points at."""
        if any(wrapper in reason for wrapper in WRAPPERS) or "process ended" in reason:
            found = [m[1] for line in self._log if (m := REASON.search(line))]
            causes = [words for words in found if not any(w in words for w in WRAPPERS)]
            reason = causes[0] if causes else f"{reason}; its last words: {self._last_words()}"
        return f"vLLM could not start {self.config.model!r}: {reason}"

    # ------------------------------------------------------------------ rows

    async def _run(self, reader: asyncio.StreamReader) -> None:
        """Take answers; when the engine dies, start it again and hand over what is unfinished."""
        barren = 0
        while True:
            reason = await self._take_answers(reader)
            assert self._process is not None
            assert self._writer is not None
            self._writer.close()
            if self._closing:
                return
            code = await end(self._process)
            logger.warning("vLLM for %r died (%s, exit code %s)", self.config.model, reason, code)
            barren = 0 if self._answered else barren + 1
            self._bury(reason)
            try:
                if barren >= BARREN_LIVES:
                    words = f"vLLM died {barren} times without answering a row: {reason}"
                    raise EngineFailed(words, temporary=True)
                reader, _ = await self._launch()
            except EngineFailed as error:
                self._fail(error)
                return
            self._send(self._open)

    async def _take_answers(self, reader: asyncio.StreamReader) -> str:
        """Deliver results until the engine is gone; returns why."""
        while True:
            try:
                frame = await read_frame(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return "its process ended"
            if "dead" in frame:
                return str(frame["dead"])
            self._answered += 1
            row = self._open.pop(frame["row"], None)
            if row is not None:  # None: cancelled while the answer was on its way
                row.settle(result_of(frame))

    def _bury(self, reason: str) -> None:
        """Count a death against the unfinished rows, and give up those that saw too many."""
        for row_id, row in list(self._open.items()):
            row.deaths += 1
            if row.deaths >= DEATHS_OF_A_ROW:
                del self._open[row_id]
                words = f"the engine died {row.deaths} times while this row was unfinished: {reason}"
                row.settle(RowError("engine", words, retryable=True))

    def _fail(self, error: EngineFailed) -> None:
        """Give up: every call that waits, and every later one, gets `error`."""
        self._failed = error
        for row in self._open.values():
            if not row.chunk.finished.done():
                row.chunk.finished.set_exception(error)

    def _send(self, rows: Mapping[int, OpenRow]) -> None:
        """Hand rows over, one frame for all that share their sampling parameters."""
        for sampling, group in itertools.groupby(rows.items(), key=lambda item: item[1].request.sampling):
            chunk = [[row_id, row.request.prompt] for row_id, row in group]
            self._write({"chunk": chunk, "sampling": dict(sampling)})

    def _write(self, frame: Frame) -> None:
        if self._writer is None or self._writer.is_closing():
            return  # the engine is down: open rows are handed over again when it is back
        data = json.dumps(frame).encode()
        self._writer.write(struct.pack("!I", len(data)) + data)


def result_of(frame: Frame) -> Result:
    """The row of a frame from the host."""
    if "error" in frame:
        return RowError(**frame["error"])
    completion = frame["completion"]
    return Completion(
        choices=tuple(
            Choice(**{**choice, "logprobs": logprobs_of(choice["logprobs"])})
            for choice in completion["choices"]
        ),
        prompt_tokens=completion["prompt_tokens"],
        completion_tokens=completion["completion_tokens"],
        prompt_logprobs=logprobs_of(completion["prompt_logprobs"]),
    )


def logprobs_of(entries: list[Any] | None) -> list[Any] | None:
    return entries and [entry and TokenLogprob(**entry) for entry in entries]


async def end(process: subprocess.Popen[bytes]) -> int:
    """Wait for an orderly end, then kill what is left of the engine's session; gives the exit code.

    Polls, because a thread to wait in is no longer to be had while the interpreter exits.
    """
    deadline = time.monotonic() + CLOSE_GRACE
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    process.kill()
    kill_session(process.pid)
    return process.wait()
