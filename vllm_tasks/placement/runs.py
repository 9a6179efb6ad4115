"""The waiting side: the flow runs that work for one step, watched until all have ended.

A run that dies is restarted: Prefect reports it as crashed, or it has sent no heartbeat for too long (if its
worker died with it, nobody else reports the death). A restarted run over a table resumes where it stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from vllm_tasks.engines.stopping import pause
from vllm_tasks.errors import EngineFailed
from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.placement.heartbeat import read_heartbeats
from vllm_tasks.placement.part import LOST, Part, Stage
from vllm_tasks.placement.target import Target
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.progress import Progress

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
"""Called at each poll of the flow runs, with the progress that they have reported."""

POLL_INTERVAL = 1.0
"""Seconds between two polls."""
MAX_DEATHS = 3
"""A part whose flow runs have died this many times is not restarted."""
LATE = 60.0
"""Seconds without a worker for a run after which a warning is logged."""
HEARTBEATS = 6
"""Heartbeats that a run sends within the timeout after which it counts as dead."""
RUNS_PER_REQUEST = 100
"""Runs that one request reads; Prefect's server returns at most 200."""
START_TIMEOUT = 10.0
"""Seconds for a run that is being created when the step is interrupted: it has to be cancelled, too."""
CANCEL_TIMEOUT = 30.0
"""Seconds in which runs commit what is finished, when another one has failed."""


@dataclass(eq=False)
class Runs:
    """The flow runs of one step on one pool."""

    target: Target
    parts: Sequence[Part]
    repeatable: bool
    """Whether a part whose run died may be restarted."""
    on_progress: OnProgress = lambda _: None
    _heartbeat_timeout: float = field(default_factory=lambda: site_settings().heartbeat_timeout)
    _is_reachable: bool = True
    """Whether Prefect's server responded to the last poll."""

    def outcomes(self) -> list[str | None]:
        """Run all parts at once and wait for them.

        When a part fails, the others are cancelled; they commit what is finished. On an interrupt, all are
        cancelled.

        Returns:
            The outcome of each part, in order, for `payload.value_of`. Of a cancelled part it is what is
            committed, "" if nothing was processed, or None if its run did not report what is committed.

        Raises:
            EngineFailed: The run of a part has failed without an outcome, or has died too often.
        """
        try:
            for part in self.parts:
                self._start(part)
            while not all(part.ended for part in self.parts):
                pause(POLL_INTERVAL)
                self._poll()
                self.on_progress(self._progress())
                if any(part.stage in LOST for part in self.parts):
                    self._end_others()
                    break
        except BaseException:
            self._cancel()
            raise
        return [self._outcome(part) for part in self.parts]

    # ------------------------------------------------------------------ start and end

    def _start(self, part: Part) -> None:
        parameters = {**part.parameters, "heartbeat_interval": self._heartbeat_timeout / HEARTBEATS}
        create = partial(
            run_deployment,
            name=self.target.deployment,
            parameters=parameters,
            job_variables=self.target.job_variables,
            flow_run_name=part.name,
            work_queue_name=self.target.queue,
            idempotency_key=str(uuid4()),  # so that a repeated request creates no second run
            timeout=0,
        )

        def start() -> None:
            run = create()
            assert isinstance(run, FlowRun)
            part.run, part.state, part.heartbeat, part.since = run.id, run.state, None, time.monotonic()

        within_grace_period(start, to_finish=START_TIMEOUT)
        logger.info("%s: flow run %s on the work pool %r", part.name, part.run, self.target.pool)

    def _end_others(self) -> None:
        for part in self.parts:
            part.dropped = not part.ended
        self._cancel()
        until = time.monotonic() + CANCEL_TIMEOUT
        while not all(part.ended for part in self.parts) and time.monotonic() < until:
            time.sleep(POLL_INTERVAL)
            self._poll(restart=False)

    def _cancel(self) -> None:
        with get_client(sync_client=True) as client:
            for part in self.parts:
                if part.run is not None and not part.ended:
                    _set_state(client, part.run, Cancelling())

    def _outcome(self, part: Part) -> str | None:
        if part.outcome is not None:
            return part.outcome
        if not part.dropped:
            raise EngineFailed(f"the flow run {part.name!r} ({part.run}) has failed: {_reason(part.state)}")
        return part.stopped or (None if part.has_begun or not part.ended else "")

    # ------------------------------------------------------------------ polls

    def _poll(self, *, restart: bool = True) -> None:
        """Update all parts that have not ended; while Prefect's server is down, none counts as dead."""
        open_parts = {part.run: part for part in self.parts if part.run is not None and not part.ended}
        try:
            with get_client(sync_client=True) as client:
                self._update(client, open_parts)
        except (httpx.HTTPError, PrefectException) as error:
            if self._is_reachable:
                logger.warning(
                    "Prefect's server does not report the flow runs of this step; waiting: %s", error
                )
            self._is_reachable = False
            for part in open_parts.values():
                part.since = time.monotonic()
            return
        self._is_reachable = True
        for part in open_parts.values():
            if restart and self._restart_dead(part):
                return  # starting may take minutes; the next poll judges the others by new heartbeats
            self._warn_late(part)

    def _update(self, client: SyncPrefectClient, parts: dict[UUID, Part]) -> None:
        ids = list(parts)
        for first in range(0, len(ids), RUNS_PER_REQUEST):
            some = ids[first : first + RUNS_PER_REQUEST]
            # A run reports its outcome before it ends. If its state were read last, it could end in between
            # and seem to have no outcome.
            states = _states(client, some)
            heartbeats = read_heartbeats(client, some)
            for run in some:
                state = states.get(run, Crashed(message="It was deleted."))
                parts[run].update(state, heartbeats.get(run, {}))

    def _restart_dead(self, part: Part) -> bool:
        """Restart a part whose run is dead, unless it was being cancelled; return whether it was restarted.

        A run that only looks dead and its successor process some rows twice; each key still has one output.
        """
        # While a job is being created, perhaps from a large image, there is no heartbeat.
        limits = {
            Stage.WORKING: self._heartbeat_timeout,
            Stage.CANCELLING: self._heartbeat_timeout,
            Stage.STARTING: site_settings().engine_start_timeout,
        }
        if part.unchanged_for > limits.get(part.stage, math.inf):
            assert part.run is not None
            logger.warning("%s: no heartbeat for %.0f s", part.name, part.unchanged_for)
            message = f"It sent no heartbeat for {part.unchanged_for:.0f} s."
            cancelled = part.stage is Stage.CANCELLING  # and nothing is left that could end it
            part.state = Cancelled(message=message) if cancelled else Crashed(message=message)
            with get_client(sync_client=True) as client:
                _set_state(client, part.run, part.state)
        if part.stage is Stage.DIED:
            part.deaths += 1
            if self.repeatable and part.deaths < MAX_DEATHS:
                logger.warning("%s died (%s) and is restarted", part.name, _reason(part.state))
                self._start(part)
                return True
        return False

    def _warn_late(self, part: Part) -> None:
        if part.stage is Stage.QUEUED and part.unchanged_for > LATE and not part.warned_late:
            part.warned_late = True
            logger.warning(
                "%s has waited %.0f s for a worker; start one: prefect worker start --pool %r",
                part.name, part.unchanged_for, self.target.pool,
            )  # fmt: skip

    def _progress(self) -> Progress:
        """The progress of all parts together, as far as they have reported it."""
        reported = [part.progress for part in self.parts if part.progress]
        return Progress.of_parts(reported, complete=len(reported) == len(self.parts))


def _reason(state: State[Any] | None) -> str:
    return (state and (state.message or state.name)) or "no reason was given"


def _set_state(client: SyncPrefectClient, run: UUID, state: State[Any]) -> None:
    try:
        client.set_flow_run_state(run, state, force=state.is_final())
    except ObjectNotFound:
        logger.warning("the flow run %s was deleted", run)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("the state of the flow run %s could not be set to %s: %s", run, state.name, error)


def _states(client: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, State[Any] | None]:
    wanted = FlowRunFilter.model_validate({"id": {"any_": runs}})
    return {run.id: run.state for run in client.read_flow_runs(flow_run_filter=wanted, limit=len(runs))}
