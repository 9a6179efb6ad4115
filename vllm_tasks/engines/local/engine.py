"""An engine in another process: it gets rows, is restarted when it dies or hangs, and ends with this one."""

from __future__ import annotations

import asyncio
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
from vllm_tasks.engines.local.model_files import stamps
from vllm_tasks.engines.local.process import HostProcess
from vllm_tasks.engines.session import Frame
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import EngineFailed, InvalidCall
from vllm_tasks.rows import Request, Result, RowError, given_up, is_chat

logger = logging.getLogger(__name__)

WINDOW_FACTOR = 1.1
"""Rows in flight per row that vLLM runs at once. The surplus waits in vLLM, so that no slot is empty."""
BARREN_LIVES = 3
"""Deaths in a row, with no completed row between and no row to blame, after which an engine stays dead."""
CHECKS = 10
"""Number of checks for progress within the time after which an engine counts as hung."""


@dataclass(frozen=True)
class LocalConfig:
    """vLLM's engine arguments, as JSON, and the GPUs that they need. Equal configurations share an engine.

    `python`: the interpreter that has vLLM; empty: this process's.
    `timeout`: seconds without progress after which an engine that has rows counts as hung.
    """

    engine_args: str = field(repr=False)  # its hf_token is a secret
    start_timeout: float = field(compare=False)
    python: str = ""
    gpus: int = field(default=0, compare=False)
    timeout: float = field(default=600.0, compare=False)


class Host(Protocol):
    """A process that holds an engine, and the channel to it. `host` documents the frames."""

    model: str

    async def read(self) -> Frame:
        """Wait for the next frame; it is empty if the host has ended."""

    def write(self, frame: Frame) -> None:
        """Send a frame. It is dropped if the host has ended."""

    def why(self, reason: str) -> str:
        """Why the host ended; `reason` is from its last frame, or empty."""

    async def end(self, grace: float = ...) -> None:
        """End the host and its processes: orderly, or by force after `grace` seconds or when cancelled."""


Launch = Callable[[Frame, float], Awaitable[tuple[Host, Frame]]]
"""Starts a host from engine arguments and a timeout in seconds; returns it when ready, with its facts."""


class State(Enum):
    """The states of an engine's host, each with its meaning."""

    STARTING = "no host runs, at first or since the last one died: rows wait"
    READY = "the host gets rows"
    FAILED = "no host will be started again: every call gets the error"


MOVES = {
    State.STARTING: {State.READY, State.FAILED},
    State.READY: {State.STARTING},
    State.FAILED: set[State](),
}
"""The states that may follow each state."""


class LocalEngine:
    """An `Engine` over a host with a vLLM `AsyncLLM`: a child process, unless `launch` starts another one."""

    def __init__(self, config: LocalConfig, launch: Launch | None = None) -> None:
        self.config = config
        self._launch = launch or self._launch_here
        self._claim = Claim(0 if launch else config.gpus)  # Ray accounts for the GPUs of its hosts
        self.window = Window(1)  # set when the engine has reported its size
        self._arguments: Frame = json.loads(config.engine_args)
        self.model: str = self._arguments["model"]
        self._stamps = stamps(self._arguments)  # from before the files were loaded
        self._rows = Rows()
        self._state = State.STARTING
        self._host: Host  # the newest one
        self._error: EngineFailed  # only in the state FAILED
        self._has_chat_template = False
        self._barren = 0
        self._moved = 0.0
        self._life: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether new rows would be sent immediately: not while it starts or runs suspects."""
        return self._state is State.READY and not self._rows.some_wait

    @property
    def has_failed(self) -> bool:
        return self._state is State.FAILED

    @property
    def is_outdated(self) -> bool:
        """Whether files of the model have changed, of which the engine has the former contents."""
        return self._stamps != stamps(self._arguments)

    async def start(self) -> None:
        if self._arguments.get("trust_remote_code"):
            log_trust(self.model)
        await self._claim.take()
        self._stamps = stamps(self._arguments)
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
        for sampling in {id(request.sampling): request.sampling for request in requests}.values():
            check_is_json(sampling)
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
            if not self.has_failed:  # else it is ending and releases its GPUs
                self._life.cancel()  # which ends the host that runs or is being started
            await asyncio.wait({self._life})

    async def _launch_here(self, arguments: Frame, timeout: float) -> tuple[Host, Frame]:  # noqa: ASYNC109
        check_exists(Path(arguments["model"]))
        return await HostProcess.launch(arguments, timeout, self.config.python, self._claim.devices)

    async def _live_and_release(self, host: Host) -> None:
        """Run until no host can be started any more. Then all waiting and all later calls fail."""
        try:
            await self._live(host)
        except Exception as error:  # noqa: BLE001 - such as a full disk: no call may wait for ever
            other = f"vLLM for {host.model!r} could not be restarted: {type(error).__name__}: {error}"
            words = str(error) if isinstance(error, EngineFailed) else other
            self._error = EngineFailed(words, temporary=True)  # because it ran before
            self._error.__cause__ = error
            self._become(State.FAILED)
            self._rows.fail(self._error)
        finally:
            await self._claim.release()

    async def _live(self, host: Host) -> None:
        """Receive results. When the engine has ended, restart it and send the unfinished rows again.

        Raises `EngineFailed` if it cannot be restarted.
        """
        while True:
            why = await self._until_death(host)
            logger.warning("vLLM for %r died: %s", host.model, why)
            self._barren = 0 if self._rows.count_death(why) else self._barren + 1
            if self._barren >= BARREN_LIVES:
                times = f"{self._barren} times without completing a row"
                raise EngineFailed(f"vLLM for {host.model!r} died {times}: {why}")
            if self.is_outdated:  # rows of one call would be answered by two models
                raise EngineFailed(
                    f"vLLM for {host.model!r} died: {why}; it is not restarted, because files of the model "
                    "have changed since it was started"
                )
            host, _ = await self._launch(self._arguments, self.config.start_timeout)

    async def _until_death(self, host: Host) -> str:
        """Send rows until the engine ends or hangs, then end the rest of it. Returns the reason."""
        self._host = host
        self._become(State.READY)
        receiving = asyncio.create_task(self._receive(host))
        hangs = False
        try:
            self._send()
            while not receiving.done() and not hangs:
                await asyncio.wait({receiving}, timeout=self.config.timeout / CHECKS)
                hangs = not receiving.done() and self._hangs()
        finally:
            receiving.cancel()
            self._become(State.STARTING)
            await (host.end(grace=0) if hangs else host.end())
        if hangs:
            seconds = f"{self.config.timeout:g} s (VLLM_TASKS_ENGINE_TIMEOUT)"
            return f"it hung: no progress with any of {len(self._rows.in_flight)} rows for {seconds}"
        return host.why(receiving.result())

    def _hangs(self) -> bool:
        if not self._rows.in_flight:
            self._moved = time.monotonic()
        return time.monotonic() - self._moved > self.config.timeout

    async def _receive(self, host: Host) -> str:
        """Deliver results until the engine ends. Returns its own reason, which may be empty."""
        while True:
            self._moved = time.monotonic()
            frame = await host.read()
            if "row" in frame:
                self._take(frame)
            elif "progress" not in frame:
                return str(frame.get("dead", ""))

    def _take(self, frame: Frame) -> None:
        row = self._rows.complete(frame["row"])
        if row is None:
            return
        self._barren = 0
        if "invalid" in frame and row.request.lora is not None:
            row.settle(RowError("refused", frame["invalid"]))  # an adapter of the row's own
        elif "invalid" in frame:
            row.chunk.fail(InvalidCall(frame["invalid"]))
        else:
            row.settle(result_of(frame, row.request))
        self._send()

    def _become(self, state: State) -> None:
        assert state in MOVES[self._state], f"{self._state.name} -> {state.name}"
        self._state = state

    def _send(self) -> None:
        """Send the rows that may be sent, in one frame for all that share task and sampling parameters."""
        if self._state is not State.READY or not self._rows.some_wait:
            return
        # Not only those that are side by side: rows may have parameters of their own, in any order.
        groups: dict[tuple[str, int, bool], list[tuple[int, Request]]] = {}
        for row_id, row in self._rows.hand_over().items():
            request = row.request
            kind = request.task, id(request.sampling), is_chat(request.prompt)
            groups.setdefault(kind, []).append((row_id, request))
        for (task, _, _), rows in groups.items():
            chunk = [[row_id, _prompt_of(request)] for row_id, request in rows]
            self._host.write({"chunk": chunk, "sampling": dict(wire.sampling_of(rows[0][1])), "task": task})


def _prompt_of(request: Request) -> Any:
    return request.prompt if request.task == "generate" else wire.input_of(request)


def check_exists(folder: Path) -> None:
    """Raise `EngineFailed` for a missing path, which vLLM reports only after half a minute of imports."""
    if folder.is_absolute() and not folder.exists():
        raise EngineFailed(f"there is no model at {folder}: pass the folder or the name of a model")


def check_is_json(sampling: Mapping[str, Any]) -> None:
    """Raise `InvalidCall` for parameters that cannot be sent, before they mix with rows of other calls."""
    try:
        json.dumps(sampling)
    except (TypeError, ValueError) as error:
        raise InvalidCall(f"a sampling parameter is not a JSON value: {error}") from error


def log_trust(model: str) -> None:
    """Log, once for each engine, that code of the model may run."""
    logger.info(
        "%r may run code that comes with it (trust_remote_code=True); VLLM_TASKS_TRUST_REMOTE_CODE=false "
        "forbids this",
        model,
    )


def result_of(frame: Frame, request: Request) -> Result:
    """The result in a frame from the host. Its answer is read like one of vLLM's server over HTTP."""
    if "error" in frame:
        error = RowError(**frame["error"])
        return replace(error, kind=kind_of_refusal(error.message)) if error.kind == "refused" else error
    try:
        answer = wire.parse(wire.path_of("openai", request), request, frame["answer"])
    except wire.WrongShape as error:
        return RowError("response", str(error))
    if reason := given_up(answer):
        return RowError("engine", f"vLLM ended the row early ({reason})", retryable=True)
    return replace(answer, seconds=frame["seconds"])
