"""The exceptions of this package, by what the caller does next.

    VllmTasksError
    ├── InvalidCall        fix the call: a name, a value or a key is wrong, or a model does not exist
    ├── ServerUnavailable  wait: no server could be reached within the grace period
    ├── EngineFailed       look at the engine: it did not start, or died and could not be restarted
    ├── TablesUnavailable  wait: a lake or database could not be reached, or was full
    ├── RowErrors          look at the rows: some failed, the others have their answers
    ├── TooManyFailed      look at the rows: more failed than the budget allows; the rest is committed
    └── GateFailed         look at the model: it is below its limits; everything is recorded

A single row that fails raises no exception; its result is a `RowError` (see `vllm_tasks.rows`).
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
"""Number of rows or names that a message lists."""


class Terminated(SystemExit):
    """The end of this process by SIGTERM, raised wherever its main thread is."""


def is_of_the_row(error: BaseException) -> bool:
    """Return whether what a caller's function raised is the error of the row that it was called for.

    That is any `Exception`, `sys.exit()`, and a panic in a Rust library (pyo3's `PanicException`, not an
    `Exception`). Others, such as Ctrl-C, end the call.
    """
    ends_the_process = isinstance(error, SystemExit) and not isinstance(error, Terminated)
    return isinstance(error, Exception) or ends_the_process or type(error).__name__ == "PanicException"


def near(name: str, names: Iterable[str]) -> str:
    """Return '; did you mean ...?' with the closest of `names`, or an empty text if none is close."""
    folded = {n.casefold(): n for n in names}
    match = difflib.get_close_matches(name.casefold(), folded, 1)
    return f"; did you mean {folded[match[0]]!r}?" if match else ""


class VllmTasksError(Exception):
    """The base class of all errors of this package.

    If a call fails midway, `results` has one entry per row in input order. The entry is None for a row that
    had neither completed nor failed by then.
    """

    results: list[Any] | None = None
    repeatable: bool = True
    """Whether the same call may be repeated without repeating the work that is already done."""


class InvalidCall(VllmTasksError, ValueError):
    """The call cannot succeed as it is. The message names the value, the limit and the way out."""


class ServerUnavailable(VllmTasksError, ConnectionError):
    """No server could be reached within the grace period. The same call may succeed later."""


class EngineFailed(VllmTasksError, RuntimeError):
    """The local engine did not start, or died and could not be restarted.

    `temporary` says whether the same call may succeed later, because an engine that ran before may run again.
    """

    def __init__(self, message: str, temporary: bool = False) -> None:
        super().__init__(message, temporary)
        self.temporary = temporary

    def __str__(self) -> str:
        return str(self.args[0])


class TablesUnavailable(VllmTasksError, ConnectionError):
    """A lake or database was lost or full. The failed step wrote nothing and may be repeated."""


class RowErrors(VllmTasksError):
    """Some rows failed. It is raised after all rows have been attempted.

    `errors` has the failed rows in input order. `results` has one entry per row in input order: the answer,
    or a `RowError` for a failed row. So no completed row is lost.
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
            'on_error="return" returns failed rows as values.'
        )

    def __repr__(self) -> str:
        return f"RowErrors({len(self.errors)} of {len(self.results)} rows)"  # without the rows' contents


class _Reported(VllmTasksError):
    """A run that ended as `report` says. All finished rows are kept."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"  # Prefect logs it, so it leaves out the report


class TooManyFailed(_Reported):
    """More rows failed than `max_failed` allows. All rows that had finished by then are committed.

    `report` says how many rows failed, why, and where the outputs are.
    """

    report: Report


class GateFailed(_Reported):
    """A model is below a threshold, or regressed by more than is allowed. The run is recorded completely.

    `report` has the values and the reasons.
    """

    report: ValidationReport
