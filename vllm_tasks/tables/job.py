"""The input of a run over a table: the checked job, and the display of the run."""

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
from vllm_tasks.tables.earlier import refuse_other_source
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import Report

RETRY_DELAYS = 1, 5, 15, 30
"""Seconds before each new attempt to reach lost tables."""


class Display(Protocol):
    """Displays a run, and retries its commits."""

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, and retry it after a `TablesUnavailable` with the delays of `RETRY_DELAYS`."""

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        """Display `progress` if the last time is a while ago, and always if it is the `last`."""

    def stopped(self, committed: Report) -> None:
        """Called when an error or a signal ends the run, with the report of what is committed."""

    def close(self) -> None:
        """Called once the run has ended, however it did."""


@dataclass(frozen=True)
class Job:
    """All that a run needs, checked."""

    over: TableCall
    tables: Tables
    selection: Selection
    stamp: Row
    """Values of the columns that are the same in all output rows."""
    commit_policy: CommitPolicy
    budget: Budget
    limit: int | None
    source: str | None
    """Identity of the source, see `datalayer.source_id`; None if outputs are not distinguished by it."""
    same_source: bool
    """Whether outputs of another source are accepted."""
    started: datetime
    _began: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> datetime:
        """The start plus the monotonic time since: if the clock is set back during the run, rows committed
        since then must not seem older than the run."""
        return self.started + timedelta(seconds=time.monotonic() - self._began)

    def check_source(self) -> None:
        """Raise `InvalidCall` if the outputs are of another source, unless that is accepted."""
        if self.source is not None and not self.same_source:
            refuse_other_source(self.tables, self.selection.outputs, self.source)

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
