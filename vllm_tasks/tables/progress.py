"""The progress of a run over a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run. `to_process` is None until the source has been counted; `stopped_by` is None
    unless a budget has ended the run."""

    to_process: int | None
    succeeded: int
    failed: int
    tokens: int
    seconds: float
    stopped_by: str | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[Progress], *, complete: bool) -> Progress:
        """The sum over the parts of a run that have reported; `complete` when all parts have."""
        return cls(
            sum_of_known([p.to_process for p in parts]) if complete else None,
            sum(p.succeeded for p in parts),
            sum(p.failed for p in parts),
            sum(p.tokens for p in parts),
            max([p.seconds for p in parts], default=1e-3),
        )

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    @property
    def seconds_left(self) -> float | None:
        if self.to_process is None or not self.done:
            return None
        return max(self.to_process - self.done, 0) * self.seconds / self.done

    def __str__(self) -> str:
        of = "" if self.to_process is None else f" of {self.to_process:,}"
        left = f", {duration(self.seconds_left)} left" if self.seconds_left else ""
        if self.stopped_by:
            left = f", stopped by {self.stopped_by}"
        return (
            f"{self.done:,}{of} rows done, {self.failed:,} failed, {self.done / self.seconds:,.1f} rows/s, "
            f"{self.tokens / self.seconds:,.0f} tokens/s{left}"
        )


def duration(seconds: float) -> str:
    """Seconds as text for people."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def sum_of_known(numbers: Sequence[int | None]) -> int | None:
    """The sum, None if one of the numbers is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
