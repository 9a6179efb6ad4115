"""One engine in a process elsewhere: rows in and out, started again when it dies or hangs, ended with us."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.http.failures import kind_of_refusal
from vllm_tasks.engines.local.gpus import Claim
from vllm_tasks.engines.local.in_flight import Rows
from vllm_tasks.engines.local.process import HostProcess
from vllm_tasks.engines.session import Frame
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import EngineFailed, InvalidCall
from vllm_tasks.rows import Request, Result, RowError, given_up

logger = logging.getLogger(__name__)

WINDOW_FACTOR = 1.1
"""Rows in flight per row that vLLM runs at once: the surplus waits in vLLM, so that no place is empty."""
BARREN_LIVES = 3
"""An engine that died so many times in a row, without an answer and by no row's doing, stays dead."""
LOOKS = 10
"""Looks at whether an engine gets on, within the time in which it has to."""


@dataclass(frozen=True)
class LocalConfig:
    """vLLM's engine arguments, as JSON, and how many GPUs they need; equal ones share an engine.

    `timeout`: seconds without progress after which an engine that has rows is taken for hung.
    """

    engine_args: str = field(repr=False)  # its hf_token is a secret
    start_timeout: float = field(compare=False)
    gpus: int = field(default=0, compare=False)
    timeout: float = field(default=600.0, compare=False)


class Host(Protocol):
    """A process that holds an engine, and our way to it (`host` says what frames they are)."""

    model: str

    async def read(self) -> Frame:
        """The next frame; an empty one when the host is gone."""

    def write(self, frame: Frame) -> None:
        """Send a frame; one to a host that is gone is dropped."""

    def why(self, reason: str) -> str:
        """Why it ended, where its last frame said `reason` (or nothing)."""

    async def end(self, grace: float = ...) -> None:
        """End it and all that it started: in order, or by force after `grace` seconds and when cancelled."""


Launch = Callable[[Frame, float], Awaitable[tuple[Host, Frame]]]
"""From engine arguments and the seconds that a start may take to a host that is ready, and its facts."""


class State(Enum):
    """Of an engine's host."""

    STARTING = "there is none yet, or none since the last one died: rows wait"
    READY = "rows are handed over to it"
    FAILED = "there will be none any more: every call gets the error"


MOVES = {
    State.STARTING: {State.READY, State.FAILED},
    State.READY: {State.STARTING},
    State.FAILED: set[State](),
}
"""The states that may follow each."""


class LocalEngine:
    """An `Engine` over a host with a vLLM `AsyncLLM`: a child process, unless `launch` says otherwise."""

    def __init__(self, config: LocalConfig, launch: Launch | None = None) -> None:
        self.config = config
        self._launch = launch or self._launch_here
        self._claim = Claim(0 if launch else config.gpus)  # elsewhere, others account for the GPUs
        self.window = Window(1)  # set when the engine has told its size
        self._arguments: Frame = json.loads(config.engine_args)
        self._rows = Rows()
        self._state = State.STARTING
        self._host: Host  # the last one
        self._error: EngineFailed  # where it has failed
        self._has_chat_template = False
        self._barren = 0
        self._moved = 0.0
        self._life: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether rows would be taken at once; not while it starts, or tries what may have killed it."""
        return self._state is State.READY and not self._rows.some_wait

    @property
    def has_failed(self) -> bool:
        return self._state is State.FAILED

    async def start(self) -> None:
        if self._arguments.get("trust_remote_code"):
            tell_trust(self._arguments["model"])
        await self._claim.take()
        try:
            host, facts = await self._launch(self._arguments, self.config.start_timeout)
        except BaseException:
            await self._claim.release()
            raise
        self.window.limit = math.ceil(WINDOW_FACTOR * facts["max_num_seqs"] * facts["ranks"])
        self._has_chat_template = facts["chat_template"]
        self._life = asyncio.create_task(self._live_and_release(host))

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        if self.has_failed:
            raise self._error
        check_is_json(requests[0].sampling)
        mine, finished = self._rows.add(requests, done)
        try:
            self._send()
            await finished
        finally:
            left = self._rows.drop(mine)
            if left and self._state is State.READY:
                self._host.write({"cancel": left})
            self._send()

    async def has_chat_template(self) -> bool:
        return self._has_chat_template

    async def close(self) -> None:
        if self._life is not None:
            if not self.has_failed:  # else it is about to end, and gives its GPUs back
                self._life.cancel()  # which ends the host that is there, or is being started
            await asyncio.wait({self._life})

    async def _launch_here(self, arguments: Frame, timeout: float) -> tuple[Host, Frame]:  # noqa: ASYNC109
        check_is_there(Path(arguments["model"]))
        return await HostProcess.launch(arguments, timeout, self._claim.devices)

    async def _live_and_release(self, host: Host) -> None:
        """All its lives; where there can be no more, every call that waits, and every later one, fails."""
        try:
            await self._live(host)
        except Exception as error:  # noqa: BLE001 - a full disk, no descriptor left: nobody must wait for ever
            other = f"vLLM for {host.model!r} could not be started again: {type(error).__name__}: {error}"
            words = str(error) if isinstance(error, EngineFailed) else other
            self._error = EngineFailed(words, temporary=True)  # it ran before
            self._error.__cause__ = error
            self._become(State.FAILED)
            self._rows.fail(self._error)
        finally:
            await self._claim.release()

    async def _live(self, host: Host) -> None:
        """Take answers; when the engine is gone, start it again and hand over what is unfinished.

        Raises `EngineFailed` when that cannot be.
        """
        while True:
            why = await self._until_death(host)
            logger.warning("vLLM for %r died: %s", host.model, why)
            self._barren = 0 if self._rows.bury(why) else self._barren + 1
            if self._barren >= BARREN_LIVES:
                times = f"{self._barren} times without answering a row"
                raise EngineFailed(f"vLLM for {host.model!r} died {times}: {why}")
            host, _ = await self._launch(self._arguments, self.config.start_timeout)

    async def _until_death(self, host: Host) -> str:
        """Give it rows until the engine is gone or hangs, and end what is left of it; returns why."""
        self._host = host
        self._become(State.READY)
        answers = asyncio.create_task(self._take_answers(host))
        hangs = False
        try:
            self._send()
            while not answers.done() and not hangs:
                await asyncio.wait({answers}, timeout=self.config.timeout / LOOKS)
                hangs = not answers.done() and self._hangs()
        finally:
            answers.cancel()
            self._become(State.STARTING)
            await (host.end(grace=0) if hangs else host.end())
        if hangs:
            seconds = f"{self.config.timeout:g} s (VLLM_TASKS_ENGINE_TIMEOUT)"
            return f"it hung: no progress with any of {len(self._rows.in_flight)} rows for {seconds}"
        return host.why(answers.result())

    def _hangs(self) -> bool:
        if not self._rows.in_flight:
            self._moved = time.monotonic()
        return time.monotonic() - self._moved > self.config.timeout

    async def _take_answers(self, host: Host) -> str:
        """Deliver results until the engine is gone; returns what it says of that."""
        while True:
            self._moved = time.monotonic()
            frame = await host.read()
            if "row" in frame:
                self._take(frame)
            elif "progress" not in frame:
                return str(frame.get("dead", ""))

    def _take(self, frame: Frame) -> None:
        row = self._rows.answered(frame["row"])
        if row is None:
            return
        self._barren = 0
        if "invalid" in frame:
            row.chunk.fail(InvalidCall(frame["invalid"]))
        else:
            row.settle(result_of(frame, row.request))
        self._send()

    def _become(self, state: State) -> None:
        assert state in MOVES[self._state], f"{self._state.name} -> {state.name}"
        self._state = state

    def _send(self) -> None:
        """Hand over what may go, one frame for all rows that share their sampling parameters."""
        if self._state is not State.READY or not self._rows.some_wait:
            return
        rows = self._rows.hand_over()
        for sampling, group in itertools.groupby(
            rows.items(), lambda item: wire.sampling_of(item[1].request)
        ):
            chunk = [[row_id, row.request.prompt] for row_id, row in group]
            self._host.write({"chunk": chunk, "sampling": dict(sampling)})


def check_is_there(folder: Path) -> None:
    """Raise `EngineFailed` for a path without a model: vLLM would say so after half a minute of imports."""
    if folder.is_absolute() and not folder.exists():
        raise EngineFailed(f"there is no model at {folder}: pass the folder of one, or its name")


def check_is_json(sampling: Mapping[str, Any]) -> None:
    """Raise `InvalidCall` for what cannot be sent, before it travels with rows of other calls."""
    try:
        json.dumps(sampling)
    except (TypeError, ValueError) as error:
        raise InvalidCall(f"a sampling parameter is no JSON value: {error}") from error


def tell_trust(model: str) -> None:
    """Said once for each engine: whose code may run."""
    logger.info(
        "%r may run code that comes with it (trust_remote_code=True); VLLM_TASKS_TRUST_REMOTE_CODE=false "
        "forbids that here",
        model,
    )


def result_of(frame: Frame, request: Request) -> Result:
    """The row of a frame from the host: an answer as vLLM's server gives it, read as one over HTTP is."""
    if "error" in frame:
        error = RowError(**frame["error"])
        return replace(error, kind=kind_of_refusal(error.message)) if error.kind == "refused" else error
    try:
        answer = wire.parse(wire.path_of("openai", request), request, frame["answer"])
    except wire.WrongShape as error:
        return RowError("response", str(error))
    if reason := given_up(answer):
        return RowError("engine", f"vLLM gave the row up ({reason})", retryable=True)
    return replace(answer, seconds=frame["seconds"])
