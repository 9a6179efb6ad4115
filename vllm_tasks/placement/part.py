"""A part of a step's work, and the flow run that does it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State, StateType

from vllm_tasks.placement import payload
from vllm_tasks.tables.report import Progress

LAST_WORDS = 30.0
"""Seconds for a run to end that has told its outcome: its machine may have died with it."""


class Stage(Enum):
    """How far a part is: by what its run has told, for it may die between that and its end; else by state."""

    NEW = "it has no run yet"
    QUEUED = "no worker has taken its run"
    STARTING = "a worker makes the job of its run"
    WORKING = "its run works"
    HELD = "its run is paused, or is to end early"
    TOLD = "its run has told the outcome, and is about to end"
    DONE = "its work is done"
    FAILED = "its work has failed, or was cancelled"
    DIED = "its run ended without a word"


BY_STATE = {
    StateType.SCHEDULED: Stage.QUEUED,
    StateType.PENDING: Stage.STARTING,
    StateType.RUNNING: Stage.WORKING,
    StateType.PAUSED: Stage.HELD,
    StateType.CANCELLING: Stage.HELD,
    StateType.COMPLETED: Stage.DONE,
    StateType.FAILED: Stage.FAILED,
    StateType.CANCELLED: Stage.FAILED,
    StateType.CRASHED: Stage.DIED,
}
"""The stage of a part that has told no outcome, by Prefect's state of its run."""
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
    sign: Any = None
    since: float = 0.0
    """When `sign` was seen first."""
    progress: Progress | None = None
    outcome: str | None = None
    told_late: bool = False
    dropped: bool = False
    """Its run was cancelled by us, because another part has failed."""

    def see(self, state: State[Any] | None, told: dict[str, Any]) -> None:
        """How its run is now, and what its heartbeat tells."""
        self.state = state
        self.outcome = told.get("outcome")
        if told.get("progress"):
            self.progress = Progress(*told["progress"])
        if (sign := (state and state.type, told.get("beat"))) != self.sign:
            self.sign, self.since = sign, time.monotonic()

    @property
    def stage(self) -> Stage:
        if self.state is None:
            return Stage.NEW
        if self.outcome is None:
            return BY_STATE[self.state.type]
        if not self.state.is_final() and self.silent <= LAST_WORDS:
            return Stage.TOLD
        return Stage.FAILED if payload.has_failed(self.outcome) else Stage.DONE

    @property
    def ended(self) -> bool:
        """Whether no more comes of it."""
        return self.stage in ENDED

    @property
    def silent(self) -> float:
        """Seconds since its run has changed in any way."""
        return time.monotonic() - self.since
