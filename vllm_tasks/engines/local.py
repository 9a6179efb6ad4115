"""One engine in a process elsewhere: rows in and out, restarted once an incident, ended with us."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_tasks.engines import Done
from vllm_tasks.engines.gpus import Claim
from vllm_tasks.engines.host import Frame
from vllm_tasks.engines.process import HostProcess
from vllm_tasks.errors import EngineFailed
from vllm_tasks.rows import Choice, Completion, Request, Result, RowError, TokenLogprob, given_up
from vllm_tasks.window import Window

logger = logging.getLogger(__name__)

WINDOW_FACTOR = 1.1
"""Rows in flight per row that vLLM runs at once: the surplus waits in vLLM, so that no place is empty."""
BARREN_LIVES = 3
"""An engine that died so many times in a row without an answer is not started again."""
DEATHS_OF_A_ROW = 2
"""A row that was unfinished at so many deaths of its engine is given up."""


@dataclass(frozen=True)
class LocalConfig:
    """vLLM's engine arguments, as JSON, and how many GPUs they need; equal ones share an engine."""

    engine_args: str = field(repr=False)  # its hf_token is a secret
    start_timeout: float = field(compare=False)
    gpus: int = field(default=0, compare=False)


class Host(Protocol):
    """A process that holds an engine, and our way to it (see `vllm_tasks.engines.host` for the frames)."""

    model: str

    async def read(self) -> Frame:
        """The next frame; an empty one when the host is gone."""

    def write(self, frame: Frame) -> None:
        """Send a frame; one to a host that is gone is dropped."""

    def why(self, reason: str) -> str:
        """Why it ended, where its last frame said `reason` (or nothing)."""

    async def end(self) -> None:
        """End it and all that it started."""


Launch = Callable[[Frame, float], Awaitable[tuple[Host, Frame]]]
"""From engine arguments and the seconds that a start may take to a host that is ready, and its facts."""


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
    """An `Engine` over a host with a vLLM `AsyncLLM`: a child process, unless `launch` says otherwise."""

    def __init__(self, config: LocalConfig, launch: Launch | None = None) -> None:
        self.config = config
        self._launch = launch or self._launch_here
        self._claim = Claim(0 if launch else config.gpus)  # elsewhere, others account for the GPUs
        self.window = Window(1)  # set when the engine has told its size
        self._arguments: Frame = json.loads(config.engine_args)
        self._ids = itertools.count()
        self._open: dict[int, OpenRow] = {}
        self._host: Host | None = None  # None while there is none that is ready
        self._life: asyncio.Task[None] | None = None
        self._failed: EngineFailed | None = None

    @property
    def is_ready(self) -> bool:
        """Whether rows would be taken at once; not while it starts, for the first time or again."""
        return self._host is not None

    async def start(self) -> None:
        if self._arguments.get("trust_remote_code"):
            tell_trust(self._arguments["model"])
        await self._claim.take()
        try:
            host, facts = await self._launch(self._arguments, self.config.start_timeout)
        except BaseException:
            await self._claim.release()
            raise
        self.window.limit = math.ceil(WINDOW_FACTOR * facts["max_num_seqs"])
        self._host = host
        self._life = asyncio.create_task(self._live_and_release(host))

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
            if left and self._host:
                self._host.write({"cancel": left})

    async def close(self) -> None:
        if self._life is not None:
            self._life.cancel()  # which ends the host that is there, or is being started
            await asyncio.wait({self._life})

    async def _launch_here(self, arguments: Frame, timeout: float) -> tuple[Host, Frame]:  # noqa: ASYNC109
        check_is_there(Path(arguments["model"]))
        return await HostProcess.launch(arguments, timeout, self._claim.devices)

    async def _live_and_release(self, host: Host) -> None:
        try:
            await self._live(host)
        except Exception as error:  # noqa: BLE001 - a full disk, no descriptor left: nobody must wait for ever
            words = f"vLLM for {host.model!r} could not be started again: {type(error).__name__}: {error}"
            failed = EngineFailed(words, temporary=True)
            failed.__cause__ = error
            self._fail(failed)
        finally:
            await self._claim.release()

    async def _live(self, host: Host) -> None:
        """Take answers; when the engine dies, start it again and hand over what is unfinished."""
        barren = 0
        while True:
            try:
                answered, reason = await self._take_answers(host)
            finally:
                self._host = None
                await host.end()
            barren = 0 if answered else barren + 1
            why = host.why(reason)
            logger.warning("vLLM for %r died: %s", host.model, why)
            self._bury(why)
            try:
                if barren >= BARREN_LIVES:
                    words = f"vLLM for {host.model!r} died {barren} times without answering a row: {why}"
                    raise EngineFailed(words, temporary=True)
                host, _ = await self._launch(self._arguments, self.config.start_timeout)
            except EngineFailed as error:
                self._fail(error)
                return
            self._host = host
            self._send(self._open)

    async def _take_answers(self, host: Host) -> tuple[int, str]:
        """Deliver results until the engine is gone; returns how many, and why it is gone."""
        for answered in itertools.count():
            frame = await host.read()
            if "row" not in frame:
                return answered, str(frame.get("dead", ""))
            row = self._open.pop(frame["row"], None)
            if row is not None:  # None: cancelled while the answer was on its way
                row.settle(result_of(frame))
        raise AssertionError("itertools.count() has no end")

    def _bury(self, why: str) -> None:
        """Count a death against the unfinished rows, and give up those that saw too many."""
        for row_id, row in list(self._open.items()):
            row.deaths += 1
            if row.deaths >= DEATHS_OF_A_ROW:
                del self._open[row_id]
                words = f"the engine died {row.deaths} times while this row was unfinished: {why}"
                row.settle(RowError("engine", words, retryable=True))

    def _fail(self, error: EngineFailed) -> None:
        """Give up: every call that waits, and every later one, gets `error`."""
        self._failed = error
        for row in self._open.values():
            if not row.chunk.finished.done():
                row.chunk.finished.set_exception(error)

    def _send(self, rows: Mapping[int, OpenRow]) -> None:
        """Hand rows over, one frame for all that share their sampling parameters.

        While there is no host this does nothing: open rows are handed over when there is one again.
        """
        if self._host is None:
            return
        for sampling, group in itertools.groupby(rows.items(), key=lambda item: item[1].request.sampling):
            chunk = [[row_id, row.request.prompt] for row_id, row in group]
            self._host.write({"chunk": chunk, "sampling": dict(sampling)})


def check_is_there(folder: Path) -> None:
    """Raise `EngineFailed` for a path without a model: vLLM would say so after half a minute of imports."""
    if folder.is_absolute() and not folder.exists():
        raise EngineFailed(f"there is no model at {folder}: pass the folder of one, or its name")


def tell_trust(model: str) -> None:
    """Said once for each engine: whose code may run."""
    logger.info(
        "%r may run code that comes with it (trust_remote_code=True); VLLM_TASKS_TRUST_REMOTE_CODE=false "
        "forbids that here",
        model,
    )


def result_of(frame: Frame) -> Result:
    """The row of a frame from the host."""
    if "error" in frame:
        return RowError(**frame["error"])
    completion = frame["completion"]
    answer = Completion(
        choices=tuple(
            Choice(**{**choice, "logprobs": logprobs_of(choice["logprobs"])})
            for choice in completion["choices"]
        ),
        prompt_tokens=completion["prompt_tokens"],
        completion_tokens=completion["completion_tokens"],
        prompt_logprobs=logprobs_of(completion["prompt_logprobs"]),
        seconds=completion["seconds"],
    )
    if reason := given_up(answer):
        return RowError("engine", f"vLLM gave the row up ({reason})", retryable=True)
    return answer


def logprobs_of(entries: list[Any] | None) -> list[Any] | None:
    return entries and [entry and TokenLogprob(**entry) for entry in entries]
