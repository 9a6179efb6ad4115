"""What can go wrong, by what the caller does next.

    VllmTasksError
    ├── InvalidCall        fix the call: a name, a value, a key, a model that is not there
    ├── ServerUnavailable  wait: no server answered within the grace period
    ├── EngineFailed       look at the engine: it did not start, or died and did not come back
    ├── TablesUnavailable  wait: a lake or database could not be reached, or had no room
    ├── RowErrors          look at the rows: some failed, the others have their answers
    ├── TooManyFailed      look at the rows: more failed than the budget allows; the rest is committed
    └── GateFailed         look at the model: it is below its limits; everything is recorded

A single row that fails is not an exception but a `RowError` value (see `vllm_tasks.rows`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_tasks.printable import printable

if TYPE_CHECKING:
    from vllm_tasks.rows import RowError
    from vllm_tasks.tables.report import Report
    from vllm_tasks.validation.report import ValidationReport

SHOWN = 5


def near(name: str, names: Iterable[str]) -> str:
    """'; did you mean ...?', or nothing."""
    folded = {n.casefold(): n for n in names}
    match = difflib.get_close_matches(name.casefold(), folded, 1)
    return f"; did you mean {folded[match[0]]!r}?" if match else ""


class VllmTasksError(Exception):
    """Any error of this package.

    `results`, when a call failed under way: one entry a row in input order, None for a row that was
    neither answered nor failed by then.
    """

    results: list[Any] | None = None
    repeatable: bool = True
    """Whether the same call may be made again without doing again what is done."""


class InvalidCall(VllmTasksError, ValueError):
    """The call cannot succeed as it is; the message names the value, the limit and the way out."""


class ServerUnavailable(VllmTasksError, ConnectionError):
    """No server could be reached within the grace period; the same call may succeed later."""


class EngineFailed(VllmTasksError, RuntimeError):
    """The local engine did not start, or died and could not be started again.

    `temporary` says whether the same call may succeed later: an engine that ran before may run again.
    """

    def __init__(self, message: str, temporary: bool = False) -> None:
        super().__init__(message, temporary)
        self.temporary = temporary

    def __str__(self) -> str:
        return str(self.args[0])


class TablesUnavailable(VllmTasksError, ConnectionError):
    """A lake or database was lost or full; nothing of the failed step is written, and it may be repeated."""


class RowErrors(VllmTasksError):
    """Some rows failed after all rows were tried.

    `errors` are the failed rows in input order; `results` has one entry a row in input order,
    the failed ones as `RowError` values, so that nothing already answered is lost.
    """

    def __init__(self, errors: Sequence[RowError], results: Sequence[Any]) -> None:
        super().__init__(errors, results)
        self.errors = list(errors)
        self.results: list[Any] = list(results)

    def __str__(self) -> str:
        shown = "; ".join(
            f"row {e.index}: {e.kind}: {printable(e.reason[:200])}" for e in self.errors[:SHOWN]
        )
        more = f"; and {len(self.errors) - SHOWN} more" if len(self.errors) > SHOWN else ""
        return (
            f"{len(self.errors)} of {len(self.results)} rows failed: {shown}{more}. "
            "The answers of the others are in `.results`; "
            'on_error="return" gives failed rows as values.'
        )

    def __repr__(self) -> str:
        return f"RowErrors({len(self.errors)} of {len(self.results)} rows)"  # never the rows' contents


class _Reported(VllmTasksError):
    """A run ended as `report` says; all that was finished is kept."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"  # Prefect logs it: without the whole report


class TooManyFailed(_Reported):
    """More rows failed than `max_failed` allows; all that was finished by then is committed.

    `report` says how many, why, and where the outputs are.
    """

    report: Report


class GateFailed(_Reported):
    """A model is below a threshold, or worse than it was by more than is allowed; all of it is recorded.

    `report` has the values, and why.
    """

    report: ValidationReport
