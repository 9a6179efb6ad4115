"""How many rows of a run may fail, and how much the run may spend."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from vllm_tasks.errors import InvalidCall
from vllm_tasks.printable import printable
from vllm_tasks.tables.prices import Prices
from vllm_tasks.tables.tally import Tally

FEW = 500
"""A fraction of failed rows is taken of at least this many."""
CHANCE = 3.0
"""Standard deviations by which failures may exceed their fraction before the end: less may be chance."""
REASON_LENGTH = 300
"""Characters of a row's error in the verdict."""


@dataclass(frozen=True)
class Budget:
    """The bounds of a run: too many failed rows are an error, a spent budget is an ordinary end.

    `max_failed` is a fraction of the rows, a number, or None for any number. During a run, a fraction is
    taken of the rows that were read so far, at its end of all. Rows without an outcome count as good. A run
    is hopeless when the rows that were sent first have all failed alike. Failures that merely come sooner
    than answers cause neither.
    """

    max_failed: float | int | None
    max_total_tokens: int | None = None
    max_seconds: float | None = None
    max_cost: float | None = None
    prices: Prices = field(default_factory=Prices)

    def spent(self, tally: Tally) -> str | None:
        """The argument whose limit finished rows and the time have reached, or None.

        Raises `InvalidCall` if tokens have to be counted and the server has reported none.
        """
        if tally.uncounted and (self.max_total_tokens or (self.max_cost and self.prices.of_tokens)):
            raise InvalidCall(
                "max_total_tokens, and max_cost with a price of tokens, need the numbers of tokens, and the "
                "server has reported none (no `usage`): use max_seconds, or a price per hour"
            )
        seconds = time.monotonic() - tally.started
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return "max_seconds"
        tokens = tally.prompt_tokens, tally.completion_tokens
        if self.max_total_tokens is not None and sum(tokens) >= self.max_total_tokens:
            return "max_total_tokens"
        if self.max_cost is not None and self.prices.cost(seconds, *tokens) >= self.max_cost:
            return "max_cost"
        return None

    def exceeded(self, tally: Tally, *, at_end: bool) -> str | None:
        """Why the run must stop or has failed, or None.

        Unreadable lines count as failed rows. For a fraction they count only at the end, when the number of
        rows is known.
        """
        limit = self.max_failed
        if limit is None or (isinstance(limit, float) and limit >= 1.0):
            return None
        if tally.hopeless:
            (kind,) = tally.kinds
            why = printable(tally.worst[0].reason[:REASON_LENGTH])
            return f"the first {tally.done:,} rows all failed alike ({kind}: {why})"
        if isinstance(limit, int):
            over = tally.failed + tally.unreadable > limit
        elif at_end:
            rows, lines = max(tally.rows or 0, tally.done), tally.unreadable
            over = tally.failed > most_failed(limit, tally.done) or (
                lines > 0 and tally.failed + lines > most_failed(limit, rows + lines)
            )
        else:
            base = max(tally.read, FEW)
            over = tally.failed > limit * base + CHANCE * math.sqrt(base * limit * (1 - limit))
        return self._verdict(tally) if over else None

    def _verdict(self, tally: Tally) -> str:
        text = f"{tally.failed:,} of {tally.done:,} rows failed"
        if tally.unreadable:
            text += f" and {tally.unreadable:,} lines could not be read"
        text += f", more than max_failed={self.max_failed!r} allows"
        if tally.failed:
            most = tally.errors()[0]
            example = next(row.reason for row in tally.worst if row.kind == most.kind)
            text += f"; {most.rows:,} of them {most.kind}, as {printable(example[:REASON_LENGTH])}"
        if tally.unreadable_lines:
            text += f"; {printable(tally.unreadable_lines[0][:REASON_LENGTH])}"
        return text


def most_failed(fraction: float, rows: int) -> int:
    """The most of `rows` that are no more than a fraction of them. As a float, 0.29 * 100 is less than 29."""
    most = round(fraction * rows)
    return most if most / max(rows, 1) <= fraction else most - 1
