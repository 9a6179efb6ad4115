"""The working side: the heartbeat of a flow run that works for a step elsewhere, and what became of it.

Both are in one artifact of the flow run, without a key, so that nothing but Prefect's server has to be seen
by both sides. The clock of a sign is the side that waits: it looks whether the count has moved.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar, Token
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.exceptions import PrefectException

from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.tables.report import Progress

logger = logging.getLogger(__name__)

KIND = "vllm-tasks-step"
"""The artifact's type."""

_current: ContextVar[Heartbeat | None] = ContextVar("heartbeat", default=None)


class Heartbeat:
    """Of the flow run `run`: a beat every `every` seconds, then its outcome."""

    def __init__(self, run: UUID, every: float) -> None:
        self._run = run
        self._every = every
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="vllm-tasks-heartbeat", daemon=True)
        self._progress: Progress | None = None
        self._artifact: UUID | None = None
        self._before: Token[Heartbeat | None] | None = None

    @classmethod
    def current(cls) -> Heartbeat | None:
        """That of the flow run that this is called in, if it works for a step elsewhere."""
        return _current.get()

    def progress(self, progress: Progress) -> None:
        """What the next beat tells."""
        self._progress = progress

    def settle(self, outcome: str) -> None:
        """Tell what became of the step; raises where Prefect's server stays away."""
        self._stop()
        within_grace_period(lambda: self._tell({"outcome": outcome}))

    def __enter__(self) -> Self:
        self._artifact = within_grace_period(self._create)
        self._beats.start()
        self._before = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        _current.reset(self._before)
        self._stop()

    def _create(self) -> UUID:
        created = ArtifactCreate(type=KIND, data={"beat": 0}, flow_run_id=self._run)
        with get_client(sync_client=True) as client:
            return client.create_artifact(created).id

    def _stop(self) -> None:
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._every):
            beat += 1
            done = self._progress
            told = (
                None
                if done is None
                else [done.to_process, done.succeeded, done.failed, done.tokens, done.seconds]
            )
            try:
                self._tell({"beat": beat, "progress": told})
            except (httpx.HTTPError, PrefectException) as error:
                logger.warning("no heartbeat could be sent: %s", error)

    def _tell(self, data: dict[str, Any]) -> None:
        assert self._artifact is not None
        with get_client(sync_client=True) as client:
            client.update_artifact(self._artifact, ArtifactUpdate(data=data))


def told_by(client: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
    """What the heartbeats of these flow runs tell."""
    wanted = ArtifactFilter.model_validate({"flow_run_id": {"any_": runs}, "type": {"any_": [KIND]}})
    told: dict[UUID, dict[str, Any]] = {}
    for artifact in client.read_artifacts(artifact_filter=wanted):
        assert artifact.flow_run_id is not None
        assert isinstance(artifact.data, dict)
        # One that was made twice, because the first answer was lost, beats in one place only.
        told[artifact.flow_run_id] = max(told.get(artifact.flow_run_id, {}), artifact.data, key=_latest)
    return told


def _latest(told: dict[str, Any]) -> tuple[bool, int]:
    return "outcome" in told, told.get("beat", 0)
