"""The result of a run over a table: the `Report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from vllm_tasks.printable import printable
from vllm_tasks.rows import reason_of, without_sender
from vllm_tasks.tables.progress import sum_of_known

EXAMPLES = 5
"""Keys that are listed for each kind of error."""
WORST = 50
"""Failed rows whose key and message are kept for the table of errors, and rows for that of reviews."""
LINE_LENGTH = 200
"""Characters that are logged about a line that could not be read."""

PROBABILITY = attrgetter("probability")


@dataclass(frozen=True)
class FailedRow:
    """Why one row has no output. `key` has one value for each column of the key, as in the table."""

    key: tuple[Any, ...]
    kind: str
    message: str

    @property
    def reason(self) -> str:
        """The message for logs and pages, without text that the model wrote."""
        return reason_of(self.kind, self.message)

    @property
    def short_reason(self) -> str:
        """The reason without the status and the address of a server."""
        return without_sender(self.reason)


@dataclass(frozen=True)
class ErrorKind:
    """The number of rows that failed in one way, with the keys of some of them."""

    kind: str
    rows: int
    keys: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class ReviewRow:
    """One row that the run marked for a person: the model's label and its probability."""

    key: tuple[Any, ...]
    label: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """One answer of a run, for people to look at: the first choice, or the beginning of a long one."""

    key: tuple[Any, ...]
    answer: str


@dataclass(frozen=True)
class Report:
    """The result of `predict_in_db`. Counts are of source rows, tokens are as vLLM counts them.

    Attributes:
        model: Identifier of the model.
        predict_id: Name of the outputs.
        source: Where the rows were read.
        outputs: Where the outputs are.
        fingerprint: Hash of all that decides an answer.
        rows: Rows in the source (with the `ids`); None when they were not counted in time.
        up_to_date: How many of `rows` needed no request; None with `limit` or `retry_failed`, or when the run
            stopped early.
        processed: `succeeded` + `failed`, all of them committed.
        succeeded: Rows with an output.
        failed: Rows with an error.
        truncated: Rows whose answer was truncated at `max_tokens`.
        prompt_tokens: Tokens of the prompts.
        completion_tokens: Tokens of the answers.
        commits: Number of commits.
        seconds: The `total` and its parts, which overlap: `check` (the call, the source and its keys),
            `first_row` (from the start to the first row that was sent), `read` (source and prompts),
            `answer` (from the first row sent to the last answer), `commit`.
        errors: For each kind of error the number of rows and some keys, the most frequent kind first.
        worst: Failed rows with their messages, about 50 at most.
        samples: Some answers, as many as VLLM_TASKS_REPORT_SAMPLES says.
        served_by: What the server reports of itself, such as vLLM's version; empty for a local engine.
        replaced: How many of the processed rows had an output of an earlier prompt, sampling or model.
        unreadable: Lines of the source without a readable key, which have no output.
        unreadable_lines: Where some of these lines are, and why they could not be read.
        chat: True if texts were sent through the model's chat template, False if as plain text.
        stopped_by: The argument (`max_seconds`, ...) whose limit ended the run before its last row; None if
            none did.
        remaining: Rows that such a run left to the next one; None when they were not counted in time.
        unreported_shards: Shards that were cancelled, because another one had failed, and did not report what
            they had committed by then: no count includes their rows.
        reasked: Rows with more than one attempt (`repair`, `resample`).
        repaired: How many of these have an output.
        to_review: Rows that were marked for a person (`review_below` of `Classes`).
        reviews: The least probable of these.
    """

    model: str
    predict_id: str
    source: str
    outputs: str
    fingerprint: str
    rows: int | None
    up_to_date: int | None
    processed: int
    succeeded: int
    failed: int
    truncated: int
    prompt_tokens: int
    completion_tokens: int
    commits: int
    seconds: dict[str, float]
    errors: tuple[ErrorKind, ...] = ()
    worst: tuple[FailedRow, ...] = field(default=(), repr=False)
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    served_by: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    unreadable: int = 0
    unreadable_lines: tuple[str, ...] = ()
    chat: bool | None = None
    stopped_by: str | None = None
    remaining: int | None = 0
    unreported_shards: int = 0
    reasked: int = 0
    repaired: int = 0
    to_review: int = 0
    reviews: tuple[ReviewRow, ...] = field(default=(), repr=False)

    @property
    def sent_as(self) -> str:
        """How texts were sent: `chat template`, `plain text`, or empty if that is not known."""
        return {True: "chat template", False: "plain text", None: ""}[self.chat]

    @classmethod
    def of_shards(
        cls, reports: Sequence[Report], total: float, *, shards: int, unreported: int = 0
    ) -> Report:
        """Merge the reports of a run that was split into shards.

        Counts are added up, except for unreadable lines, which every shard meets. Each phase has the seconds
        of the shard that took longest.

        Args:
            reports: The reports of the shards, at least one.
            total: Seconds that the complete run took.
            shards: Number of shards; with fewer reports, the rows of the source are not known.
            unreported: Number of shards that may have committed rows, but did not report them.

        Returns:
            The report of the complete run.
        """
        counts = (
            *("processed", "succeeded", "failed", "truncated", "replaced", "to_review"),
            *("prompt_tokens", "completion_tokens", "commits", "reasked", "repaired"),
        )
        most = max(reports, key=lambda r: r.unreadable)
        most_samples = max(len(r.samples) for r in reports)
        longest = {
            phase: max(r.seconds.get(phase, 0.0) for r in reports)
            for report in reports
            for phase in report.seconds
        }
        return replace(
            reports[0],
            rows=None if len(reports) < shards else sum_of_known([r.rows for r in reports]),
            up_to_date=None if len(reports) < shards else sum_of_known([r.up_to_date for r in reports]),
            **{name: sum(getattr(r, name) for r in reports) for name in counts},
            seconds={**longest, "total": round(total, 3)},
            errors=_merged([e for r in reports for e in r.errors]),
            worst=_some_of_each_kind([row for r in reports for row in r.worst]),
            samples=tuple(islice(chain.from_iterable(r.samples for r in reports), most_samples)),
            reviews=tuple(sorted([row for r in reports for row in r.reviews], key=PROBABILITY)[:WORST]),
            unreadable=most.unreadable,
            unreadable_lines=most.unreadable_lines,
            stopped_by=next((r.stopped_by for r in reports if r.stopped_by), None),
            remaining=sum_of_known([r.remaining for r in reports]),
            unreported_shards=unreported,
        )

    def __str__(self) -> str:
        others = "" if self.up_to_date is None else f", {self.up_to_date:,} were up to date"
        if self.to_review:
            others += f", {self.to_review:,} are for review"
        if self.unreadable:
            others += f", {self.unreadable:,} lines could not be read"
        if self.stopped_by:
            rest = "some" if self.remaining is None else f"{self.remaining:,}"
            others += f", stopped by {self.stopped_by} with {rest} rows left"
        if self.reasked:
            others += f", {self.repaired:,} of {self.reasked:,} rows that were attempted again were repaired"
        if self.unreported_shards:
            others += f", without the rows of {self.unreported_shards} cancelled shards, which did not report"
        if not self.processed:
            done = "no row processed" if self.stopped_by else "nothing to process"
            return f"{self.predict_id}: {done}{others}{self._lines}; outputs: {self.outputs}"
        if self.replaced:
            others += f", {self.replaced:,} outputs of an earlier prompt, sampling or model replaced"
        kinds = "".join(f"; {e.kind}: {e.rows:,}" for e in self.errors)
        return (
            f"{self.predict_id}: {self.succeeded:,} rows succeeded, {self.failed:,} failed{others}, "
            f"{self.completion_tokens:,} completion tokens in {self.seconds['total']:.1f} s"
            f"{self.sent_as and f' (sent as {self.sent_as})'}{kinds}{self._lines}; outputs: {self.outputs}"
        )

    def example_of(self, kind: str) -> str:
        """Return why a row of this kind failed, without the address of a server; empty if none was kept."""
        return next((row.short_reason for row in self.worst if row.kind == kind), "")

    def __repr__(self) -> str:
        return f"<Report of {self}>"

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from vllm_tasks.tables.notebook import html_of

        return html_of(self)

    @property
    def _lines(self) -> str:
        return "".join(f"; {printable(line[:LINE_LENGTH])}" for line in self.unreadable_lines[:EXAMPLES])


def _some_of_each_kind(failed: Sequence[FailedRow]) -> tuple[FailedRow, ...]:
    """The first `WORST` rows, and the first few of each kind: an error quotes the most frequent kind."""
    of_kind: Counter[str] = Counter()
    found: list[FailedRow] = []
    for row in failed:
        of_kind[row.kind] += 1
        if len(found) < WORST or of_kind[row.kind] <= EXAMPLES:
            found.append(row)
    return tuple(found)


def _merged(errors: Sequence[ErrorKind]) -> tuple[ErrorKind, ...]:
    """One entry for each kind of error, the most frequent first."""
    kinds = {e.kind: [other for other in errors if other.kind == e.kind] for e in errors}
    merged = [
        ErrorKind(kind, sum(e.rows for e in same), tuple(key for e in same for key in e.keys)[:EXAMPLES])
        for kind, same in kinds.items()
    ]
    return tuple(sorted(merged, key=lambda e: -e.rows))
