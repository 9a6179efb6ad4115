"""When a group of finished rows is committed."""

from __future__ import annotations

from dataclasses import dataclass

FULLEST = 16
"""A commit takes all rows finished by then, up to this many times the rows that close a group."""
APART = 5.0
"""Seconds between two commits, unless the second one is full: at a thousand rows a second, groups of 512
would cost Prefect and the log more than they are worth."""
AT_RISK = 0.1
"""The fraction of a run's time that a crash may undo. Early groups close early: otherwise a small job would
be one group, and a crash would repeat all of it."""
WIDEST = 32 * 2**20
"""Bytes of answers that close a group, however few its rows are."""


@dataclass(frozen=True)
class CommitPolicy:
    """When a commit group closes: at `rows` rows or `seconds` after its first row; earlier at first."""

    rows: int
    seconds: float
    most: int
    apart: float

    @classmethod
    def of(cls, max_chunk_size: int | None, commit_rows: int, commit_seconds: float) -> CommitPolicy:
        """The caller's size is kept if there is one; otherwise groups grow where rows are fast."""
        if max_chunk_size is not None:
            return cls(max_chunk_size, commit_seconds, max_chunk_size, 0.0)
        return cls(commit_rows, commit_seconds, FULLEST * commit_rows, APART)

    def is_full(self, finished: int, size: int) -> bool:
        """Whether a group of `finished` rows and `size` bytes takes no more rows."""
        return finished >= self.most or size >= WIDEST

    def is_due(self, finished: int, age: float, since_commit: float, elapsed: float, *, redo: bool) -> bool:
        """Whether a group of `finished` rows closes now, full or not.

        All times are seconds: the `age` of its first row, the time since the last commit, and the time since
        the first answer of the run. Redone rows wait for full groups: a lake copies each file they are in.
        """
        max_age = self.seconds if redo else min(self.seconds, max(APART, AT_RISK * elapsed))
        if finished >= self.most or age >= max_age:
            return True
        return finished >= self.rows and since_commit >= self.apart and not (redo and self.apart)
