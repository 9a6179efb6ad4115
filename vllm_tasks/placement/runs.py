"""The waiting side: flow runs that work for one step, watched until all have ended.

One that dies is made again: a run that Prefect calls crashed, or that has given no sign of life for too long
(its worker died with it, and nobody else will tell). A rerun over a table goes on where the dead one stopped.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelling, Crashed

from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import EngineFailed
from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.placement.heartbeat import told_by
from vllm_tasks.placement.part import LOST, Part, Stage
from vllm_tasks.placement.target import Target
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.report import Progress

logger = logging.getLogger(__name__)

T = TypeVar("T")

Shown = Callable[[Progress], None]
"""Called at each look at the flow runs with their progress, as far as they tell."""

LOOKED_EVERY = 1.0
"""Seconds between two looks."""
DEATHS = 3
"""A part whose flow runs died so many times is not made again."""
LATE = 60.0
"""Seconds after which it is said that no worker takes a run."""
BEATS = 6
"""Signs of life within the time of silence after which a run counts as dead."""
SEEN_AT_ONCE = 100
"""Runs that are asked for in one request; Prefect's server refuses to give more than 200."""
STARTED_WITHIN = 10.0
"""Seconds for a run that is just being made when the step is interrupted: it has to be cancelled, too."""
CANCELLED_WITHIN = 30.0
"""Seconds that runs get to commit what is finished, when another one has failed."""


@dataclass(eq=False)
class Runs:
    """The flow runs of one step on one pool."""

    target: Target
    parts: Sequence[Part]
    repeatable: bool
    """Whether a part whose run died may be done again."""
    shown: Shown = lambda _: None
    _silence: float = field(default_factory=lambda: site_settings().silence)
    _is_seen: bool = True
    """Whether the last look saw anything."""

    def outcomes(self) -> list[str]:
        """What became of each part, in order; see `payload.value_of`.

        When one fails, the others are cancelled, commit what is finished, and may have no outcome (""). When
        this is interrupted, all are cancelled. Raises `EngineFailed` for a part that never came to an end.
        """
        try:
            for part in self.parts:
                self._start(part)
            while not all(part.ended for part in self.parts):
                time.sleep(LOOKED_EVERY)
                raise_if_stopped()
                self._look()
                self.shown(self._progress())
                if any(part.stage in LOST for part in self.parts):
                    self._end_others()
                    break
        except BaseException:
            self._cancel()
            raise
        return [self._outcome(part) for part in self.parts]

    # ------------------------------------------------------------------ start and end

    def _start(self, part: Part) -> None:
        parameters = {**part.parameters, "heartbeat_interval": self._silence / BEATS}
        make = partial(
            run_deployment,
            name=self.target.deployment,
            parameters=parameters,
            job_variables=self.target.job_variables,
            flow_run_name=part.name,
            work_queue_name=self.target.queue,
            idempotency_key=str(uuid4()),  # asked twice, Prefect makes one run
            timeout=0,
        )

        def start() -> None:
            run = make()
            assert isinstance(run, FlowRun)
            part.run, part.state, part.sign, part.since = run.id, run.state, None, time.monotonic()

        within_grace_period(partial(outside_of_loops, start))
        logger.info("%s: flow run %s on the work pool %r", part.name, part.run, self.target.pool)

    def _end_others(self) -> None:
        for part in self.parts:
            part.dropped = not part.ended
        self._cancel()
        until = time.monotonic() + CANCELLED_WITHIN
        while not all(part.ended for part in self.parts) and time.monotonic() < until:
            time.sleep(LOOKED_EVERY)
            self._look(rerun=False)

    def _cancel(self) -> None:
        with get_client(sync_client=True) as client:
            for part in self.parts:
                if part.run is not None and not part.ended:
                    _set_state(client, part.run, Cancelling())

    def _outcome(self, part: Part) -> str:
        if part.outcome is not None:
            return part.outcome
        if part.dropped:
            return ""
        raise EngineFailed(f"the flow run {part.name!r} ({part.run}) has failed: {_words(part.state)}")

    # ------------------------------------------------------------------ looks

    def _look(self, *, rerun: bool = True) -> None:
        """See how all are; a Prefect server that is away for a while is waited for."""
        open_parts = {part.run: part for part in self.parts if part.run is not None and not part.ended}
        try:
            with get_client(sync_client=True) as client:
                self._see(client, open_parts)
        except (httpx.HTTPError, PrefectException) as error:
            if self._is_seen:
                logger.warning("the flow runs of this step cannot be seen, until Prefect answers: %s", error)
            self._is_seen = False
            for part in open_parts.values():
                part.since = time.monotonic()
            return
        self._is_seen = True
        for part in open_parts.values():
            if rerun:
                self._bury(part)
            self._tell_late(part)

    def _see(self, client: SyncPrefectClient, parts: dict[UUID, Part]) -> None:
        ids = list(parts)
        for first in range(0, len(ids), SEEN_AT_ONCE):
            some = ids[first : first + SEEN_AT_ONCE]
            states = _states(client, some)
            told = told_by(client, some)  # later than the states: a run tells its outcome before it ends
            for run in some:
                parts[run].see(states.get(run, Crashed(message="It was deleted.")), told.get(run, {}))

    def _bury(self, part: Part) -> None:
        """Make a part again whose run is dead."""
        limits = {Stage.WORKING: self._silence, Stage.STARTING: site_settings().engine_start_timeout}
        # A job that is being made, of a large image perhaps, gives no sign.
        if part.silent > limits.get(part.stage, math.inf):
            assert part.run is not None
            logger.warning("%s: no sign of life for %.0f s", part.name, part.silent)
            part.state = Crashed(message=f"It gave no sign of life for {part.silent:.0f} s.")
            with get_client(sync_client=True) as client:
                _set_state(client, part.run, part.state)
        if part.stage is Stage.DIED:
            part.deaths += 1
            if self.repeatable and part.deaths < DEATHS:
                logger.warning("%s died (%s) and is run again", part.name, _words(part.state))
                self._start(part)

    def _tell_late(self, part: Part) -> None:
        if part.stage is Stage.QUEUED and part.silent > LATE and not part.told_late:
            part.told_late = True
            logger.warning(
                "%s waits for a worker since %.0f s: prefect worker start --pool %r",
                part.name, part.silent, self.target.pool,
            )  # fmt: skip

    def _progress(self) -> Progress:
        """Of all parts together, as far as they tell."""
        told = [part.progress for part in self.parts if part.progress]
        return Progress.of_parts(told, complete=len(told) == len(self.parts))


def _words(state: State[Any] | None) -> str:
    return (state and (state.message or state.name)) or "no reason was given"


def _set_state(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    try:
        client.set_flow_run_state(run, state, force=state.is_crashed())
    except ObjectNotFound:
        logger.warning("the flow run %s is gone", run)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("the flow run %s could not be told: %s", run, error)


def _states(client: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, State[Any] | None]:
    wanted = FlowRunFilter.model_validate({"id": {"any_": runs}})
    return {run.id: run.state for run in client.read_flow_runs(flow_run_filter=wanted, limit=len(runs))}


def outside_of_loops(work: Callable[[], T]) -> T:
    """`work()` in a thread with this context: what is called in a running loop becomes a coroutine there.

    An interrupt of the waiting thread waits a little for what is being done.
    """
    found: list[T] = []
    failed: list[BaseException] = []
    finished = threading.Event()  # an interrupted join would take the thread for ended

    def do() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            failed.append(error)
        finally:
            finished.set()

    threading.Thread(target=copy_context().run, args=(do,), name="vllm-tasks-start", daemon=True).start()
    try:
        finished.wait()
    except BaseException:
        finished.wait(STARTED_WITHIN)
        raise
    if failed:
        raise failed[0]
    return found[0]
