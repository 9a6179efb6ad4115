"""A part of a step's work, and the flow run that does it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State

from vllm_tasks.report import Progress
from vllm_tasks.routing import parcel

LAST_WORDS = 30.0
"""Seconds for a run to end that has told its outcome: its machine may have died with it."""


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
        """Whether no more comes of it: its run has ended, or has told its outcome and then nothing more."""
        is_final = self.state is not None and self.state.is_final()
        return is_final or (self.outcome is not None and self.silent > LAST_WORDS)

    @property
    def completed(self) -> bool:
        """Whether its work is done: by what its run has told, for it may die between that and its end."""
        if self.outcome is not None:
            return not parcel.has_failed(self.outcome)
        return self.state is not None and self.state.is_completed()

    @property
    def silent(self) -> float:
        """Seconds since its run has changed in any way."""
        return time.monotonic() - self.since
