"""The working side: the heartbeat and the outcome of a flow run that works for a step elsewhere.

Both are in one artifact of the flow run, without a key, so that the two sides need only Prefect's server in
common. A heartbeat is a count: the waiting side checks by its own clock whether it has changed.
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
from vllm_tasks.tables.progress import Progress

logger = logging.getLogger(__name__)

KIND = "vllm-tasks-step"
"""The artifact's type."""

_current: ContextVar[Heartbeat | None] = ContextVar("heartbeat", default=None)


class Heartbeat:
    """A thread that writes a heartbeat for the flow run `run` every `every` seconds, and then its outcome."""

    def __init__(self, run: UUID, every: float) -> None:
        self._run = run
        self._every = every
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="vllm-tasks-heartbeat", daemon=True)
        self._progress: Progress | None = None
        self._artifact: UUID | None = None
        self._committed: str | None = None
        self._before: Token[Heartbeat | None] | None = None

    @classmethod
    def current(cls) -> Heartbeat | None:
        """Return the heartbeat of the current flow run, or None if it does not work for a step elsewhere."""
        return _current.get()

    def progress(self, progress: Progress) -> None:
        """Set the progress that the next heartbeat reports."""
        self._progress = progress

    def stopped(self, committed: str) -> None:
        """Set what is written if the flow run ends without an outcome, because it is stopped.

        Args:
            committed: The report of what is committed, as `payload.outcome_of` returns it.
        """
        self._committed = committed

    def settle(self, outcome: str) -> None:
        """Stop the heartbeat and write the outcome in its place.

        Args:
            outcome: The outcome of the step, as `payload.outcome_of` or `outcome_of_error` returns it.

        Raises:
            httpx.HTTPError: Prefect's server stays away for longer than the grace period, or refuses.
        """
        self._stop()
        self._committed = None
        within_grace_period(lambda: self._write({"outcome": outcome}))

    def __enter__(self) -> Self:
        self._artifact = within_grace_period(self._create)
        self._beats.start()
        self._before = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        _current.reset(self._before)
        self._stop()
        if self._committed is not None:
            self._try_to_write({"stopped": self._committed})

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
            progress = (
                None
                if done is None
                else [done.to_process, done.succeeded, done.failed, done.tokens, done.seconds]
            )
            self._try_to_write({"beat": beat, "progress": progress})

    def _try_to_write(self, data: dict[str, Any]) -> None:
        try:
            self._write(data)
        except (httpx.HTTPError, PrefectException) as error:
            logger.warning("the heartbeat could not be sent: %s", error)

    def _write(self, data: dict[str, Any]) -> None:
        assert self._artifact is not None
        with get_client(sync_client=True) as client:
            client.update_artifact(self._artifact, ArtifactUpdate(data=data))


def read_heartbeats(client: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, dict[str, Any]]:
    """Read the heartbeats or outcomes of flow runs.

    Args:
        client: A client of Prefect's server.
        runs: Ids of the flow runs.

    Returns:
        The artifacts' data by flow run; a run that has written nothing yet is left out.
    """
    wanted = ArtifactFilter.model_validate({"flow_run_id": {"any_": runs}, "type": {"any_": [KIND]}})
    found: dict[UUID, dict[str, Any]] = {}
    for artifact in client.read_artifacts(artifact_filter=wanted):
        assert artifact.flow_run_id is not None
        assert isinstance(artifact.data, dict)
        # Where the response to its creation was lost, a run has two artifacts, and updates only one of them.
        found[artifact.flow_run_id] = max(found.get(artifact.flow_run_id, {}), artifact.data, key=_latest)
    return found


def _latest(data: dict[str, Any]) -> tuple[bool, int]:
    return bool(data.keys() & {"outcome", "stopped"}), data.get("beat", 0)
