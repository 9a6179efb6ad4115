"""What a run over a table is given: the job, checked, and where the run is shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from vllm_tasks.calls.call import TableCall
from vllm_tasks.datalayer.selection import Row, Selection, Tables
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.commit_policy import CommitPolicy
from vllm_tasks.tables.report import Progress

RETRY_DELAYS = 1, 5, 15, 30
"""Seconds before each new attempt to reach lost tables."""


class Display(Protocol):
    """Where a run is shown, and who repeats its commits."""

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, again after a `TablesUnavailable` as `RETRY_DELAYS` say."""

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        """Called often; shows it when the last time is a while ago, and the `last` one in any case."""

    def close(self) -> None:
        """Called once the run has ended, however it did."""


@dataclass(frozen=True)
class Job:
    """All that a run needs, checked."""

    over: TableCall
    tables: Tables
    selection: Selection
    stamp: Row
    """Columns that are the same in all output rows."""
    commit_policy: CommitPolicy
    budget: Budget
    limit: int | None
    source: str | None
    """What the rows are of; see `datalayer.source_id`. None where outputs are not told apart by it."""
    same_source: bool
    """Whether outputs of another source go on."""
    started: datetime
    _began: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> datetime:
        """The time by the clock as it was at the start: when that is set back under the run, rows committed
        since must not seem older than the run."""
        return self.started + timedelta(seconds=time.monotonic() - self._began)

    @classmethod
    def of(
        cls,
        over: TableCall,
        tables: Tables,
        selection: Selection,
        commit_policy: CommitPolicy,
        budget: Budget,
        limit: int | None,
        source: str | None = None,
        *,
        same_source: bool = False,
    ) -> Job:
        """A job that starts now."""
        stamp = {
            "_model": over.model_name,
            "_uuid": over.call.uuid,
            "_fingerprint": over.fingerprint,
            "_source": source,
        }
        return cls(
            over,
            tables,
            selection,
            stamp,
            commit_policy,
            budget,
            limit,
            source,
            same_source,
            datetime.now(UTC),
        )
