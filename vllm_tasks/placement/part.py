"""A part of a step's work, and the flow run that does it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State, StateType

from vllm_tasks.placement import payload
from vllm_tasks.tables.progress import Progress

END_TIMEOUT = 30.0
"""Seconds for a run to end after it has reported its outcome: its machine may have died in between."""


class Stage(Enum):
    """How far a part is. An outcome that its run has reported counts before the run's state in Prefect.

    A run may die after it has reported its outcome.
    """

    NEW = "it has no run yet"
    QUEUED = "no worker has taken its run"
    STARTING = "a worker creates the job of its run"
    WORKING = "its run works"
    PAUSED = "its run is paused, until someone resumes or cancels it"
    CANCELLING = "its run is being cancelled"
    REPORTED = "its run has reported the outcome and is about to end"
    DONE = "its work is done"
    FAILED = "its work has failed or was cancelled"
    DIED = "its run ended without an outcome"


BY_STATE = {
    StateType.SCHEDULED: Stage.QUEUED,
    StateType.PENDING: Stage.STARTING,
    StateType.RUNNING: Stage.WORKING,
    StateType.PAUSED: Stage.PAUSED,
    StateType.CANCELLING: Stage.CANCELLING,
    StateType.COMPLETED: Stage.DONE,
    StateType.FAILED: Stage.FAILED,
    StateType.CANCELLED: Stage.FAILED,
    StateType.CRASHED: Stage.DIED,
}
"""The stage of a part whose run has reported no outcome, by the run's state in Prefect."""
LOST = {Stage.FAILED, Stage.DIED}
ENDED = {Stage.DONE, *LOST}


@dataclass(eq=False)
class Part:
    """One part of a step's work, and the flow run that does it."""

    name: str
    parameters: dict[str, Any]
    run: UUID | None = None
    deaths: int = 0
    state: State[Any] | None = None
    heartbeat: Any = None
    """The type of the state and the count of the heartbeat, when they were last read."""
    since: float = 0.0
    """When `heartbeat` changed last, by the monotonic clock."""
    progress: Progress | None = None
    outcome: str | None = None
    stopped: str | None = None
    """The outcome of a run that was stopped: the report of what it has committed."""
    has_begun: bool = False
    """Whether any of its runs has sent a heartbeat: before that, nothing is processed."""
    warned_late: bool = False
    dropped: bool = False
    """We have cancelled its run, because another part has failed."""

    def update(self, state: State[Any] | None, data: dict[str, Any]) -> None:
        """Take over what was read of its run.

        Args:
            state: The run's state in Prefect.
            data: The data of its heartbeat.
        """
        self.state = state
        self.outcome = data.get("outcome")
        self.stopped = data.get("stopped")
        self.has_begun = self.has_begun or bool(data)
        if data.get("progress"):
            self.progress = Progress(*data["progress"])
        if (heartbeat := (state and state.type, data.get("beat"))) != self.heartbeat:
            self.heartbeat, self.since = heartbeat, time.monotonic()

    @property
    def stage(self) -> Stage:
        """How far the part is now."""
        if self.state is None:
            return Stage.NEW
        if self.outcome is None:
            return BY_STATE[self.state.type]
        if not self.state.is_final() and self.unchanged_for <= END_TIMEOUT:
            return Stage.REPORTED
        return Stage.FAILED if payload.has_failed(self.outcome) else Stage.DONE

    @property
    def ended(self) -> bool:
        """Whether its run, as far as we wait for it, has ended."""
        return self.stage in ENDED

    @property
    def unchanged_for(self) -> float:
        """Seconds since its state or heartbeat last changed."""
        return time.monotonic() - self.since
