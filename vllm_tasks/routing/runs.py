"""The waiting side: flow runs that work for one step, watched until all have ended.

One that dies is made again: a run that Prefect calls crashed, or that has given no sign of life for too long
(its worker died with it, and nobody else will tell). A rerun over a table goes on where the dead one stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelling, Crashed

from vllm_tasks.errors import EngineFailed
from vllm_tasks.report import Progress
from vllm_tasks.routing.lifeline import KIND
from vllm_tasks.routing.place import Place
from vllm_tasks.settings import site_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

Shown = Callable[[Progress], None]
"""Called at each look at the flow runs with their progress, as far as they tell; may raise to stop them."""

LOOKED_EVERY = 1.0
"""Seconds between two looks."""
DEATHS = 3
"""A part whose flow runs died so many times is not made again."""
LATE = 60.0
"""Seconds after which it is said that no worker takes a run."""
BEATS = 6
"""Signs of life within the time of silence after which a run counts as dead."""
CANCELLED_WITHIN = 30.0
"""Seconds that runs get to commit what is finished, when another one has failed."""


@dataclass(eq=False)
class Part:
    """One part of a step's work, and the flow run that does it."""

    name: str
    parameters: dict[str, Any]
    run: UUID | None = None
    deaths: int = 0
    state: State[Any] | None = None
    sign: Any = None
    since: float = 0.0
    """When `sign` was seen first."""
    progress: Progress | None = None
    outcome: str | None = None
    told_late: bool = False
    dropped: bool = False
    """Its run was cancelled by us, because another part has failed."""

    def see(self, state: State[Any] | None, told: dict[str, Any]) -> None:
        """How its run is now, and what its lifeline tells."""
        self.state = state
        self.outcome = told.get("outcome")
        if told.get("progress"):
            self.progress = Progress(*told["progress"])
        if (sign := (state and state.type, told.get("beat"))) != self.sign:
            self.sign, self.since = sign, time.monotonic()

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.is_final()

    @property
    def silent(self) -> float:
        """Seconds since its run has changed in any way."""
        return time.monotonic() - self.since


@dataclass(eq=False)
class Runs:
    """The flow runs of one step on one pool."""

    place: Place
    parts: Sequence[Part]
    repeatable: bool
    """Whether a part whose run died may be done again."""
    shown: Shown
    _silence: float = field(default_factory=lambda: site_settings().silence)

    def outcomes(self) -> list[str]:
        """What became of each part, in order; see `parcel.value_of`.

        When one fails, the others are cancelled, commit what is finished, and may have no outcome (""). When
        this is interrupted, all are cancelled. Raises `EngineFailed` for a part that never came to an end.
        """
        try:
            for part in self.parts:
                self._start(part)
            while not all(part.ended for part in self.parts):
                time.sleep(LOOKED_EVERY)
                self._look()
                self.shown(self._progress())
                if any(part.ended and not _completed(part) for part in self.parts):
                    self._end_others()
                    break
        except BaseException:
            self._cancel()
            raise
        return [self._outcome(part) for part in self.parts]

    # ------------------------------------------------------------------ start and end

    def _start(self, part: Part) -> None:
        parameters = {**part.parameters, "beat_every": self._silence / BEATS}
        run = outside_of_loops(
            partial(
                run_deployment,
                name=self.place.deployment,
                parameters=parameters,
                job_variables=self.place.job_variables,
                flow_run_name=part.name,
                work_queue_name=self.place.queue,
                timeout=0,
            )
        )
        assert isinstance(run, FlowRun)
        part.run, part.state, part.sign, part.since = run.id, run.state, None, time.monotonic()
        logger.info("%s: flow run %s on the work pool %r", part.name, run.id, self.place.pool)

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
            logger.warning("the flow runs of this step cannot be seen: %s", error)
            for part in open_parts.values():
                part.since = time.monotonic()
            return
        for part in open_parts.values():
            if rerun:
                self._bury(part)
            self._tell_late(part)

    def _see(self, client: SyncPrefectClient, parts: dict[UUID, Part]) -> None:
        ids = list(parts)
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": ids}}), limit=len(ids)
        )
        states = {run.id: run.state for run in found}
        # Read later than the states: a run tells its outcome before it ends.
        lines = ArtifactFilter.model_validate({"flow_run_id": {"any_": ids}, "type": {"any_": [KIND]}})
        artifacts = client.read_artifacts(artifact_filter=lines)
        told = {artifact.flow_run_id: artifact.data for artifact in artifacts}
        for run, part in parts.items():
            part.see(states.get(run, Crashed(message="It was deleted.")), told.get(run) or {})

    def _bury(self, part: Part) -> None:
        """Make a part again whose run is dead."""
        assert part.state is not None
        if part.outcome is None and not part.ended and self._is_dead(part):
            assert part.run is not None
            logger.warning("%s: no sign of life for %.0f s", part.name, part.silent)
            part.state = Crashed(message=f"It gave no sign of life for {part.silent:.0f} s.")
            with get_client(sync_client=True) as client:
                _set_state(client, part.run, part.state)
        if part.outcome is None and part.state.is_crashed():
            part.deaths += 1
            if self.repeatable and part.deaths < DEATHS:
                logger.warning("%s died (%s) and is run again", part.name, _words(part.state))
                self._start(part)

    def _is_dead(self, part: Part) -> bool:
        assert part.state is not None
        if part.state.is_running():
            return part.silent > self._silence
        # A job that is being made, of a large image perhaps, gives no sign.
        return part.state.is_pending() and part.silent > site_settings().engine_start_timeout

    def _tell_late(self, part: Part) -> None:
        if part.state and part.state.is_scheduled() and part.silent > LATE and not part.told_late:
            part.told_late = True
            logger.warning(
                "%s waits for a worker since %.0f s: prefect worker start --pool %r",
                part.name, part.silent, self.place.pool,
            )  # fmt: skip

    def _progress(self) -> Progress:
        """Of all parts together, as far as they tell."""
        told = [part.progress for part in self.parts if part.progress]
        return Progress.of_parts(told, complete=len(told) == len(self.parts))


def _completed(part: Part) -> bool:
    return part.state is not None and part.state.is_completed()


def _words(state: State[Any] | None) -> str:
    return (state and (state.message or state.name)) or "no reason was given"


def _set_state(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    try:
        client.set_flow_run_state(run, state, force=state.is_crashed())
    except ObjectNotFound:
        logger.warning("the flow run %s is gone", run)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("the flow run %s could not be told: %s", run, error)


def outside_of_loops(work: Callable[[], T]) -> T:
    """`work()` in a thread with this context: what is called in a running loop becomes a coroutine there."""
    found: list[T] = []
    failed: list[BaseException] = []

    def do() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            failed.append(error)

    thread = threading.Thread(target=copy_context().run, args=(do,), name="vllm-tasks-start", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
