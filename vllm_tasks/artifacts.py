"""The artifacts of a run over a table in the Prefect UI: progress, report, errors, and keys of assets."""

from __future__ import annotations

import contextvars
import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_UI_URL

from vllm_tasks.datalayer.table_names import ODD
from vllm_tasks.printable import one_line, printable
from vllm_tasks.rows import CAUSES, cause_of
from vllm_tasks.tables.estimates import Estimate, lines_of
from vllm_tasks.tables.keys import display_key
from vllm_tasks.tables.previews import Preview, as_cells
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import Report

logger = logging.getLogger(__name__)

UPDATED_EVERY = 10.0
"""Seconds between two updates of the progress artifact."""
LAST_UPDATE_TIMEOUT = 5.0
"""Seconds that a finished run waits for the last update."""
MAX_MESSAGE = 50
"""Characters of an error's message in the table of errors, which then fits into a window of 1,400 pixels."""
MARKUP = re.compile(r"[<>\[\]&\\`*]|^\s*(#|[-+]\s|[0-9]+[.)]\s)")
"""What Markdown reads as more than text."""
ADDRESS = re.compile(r"://|www\.|@|mailto:|xmpp:", re.IGNORECASE)
"""The parts of an address that GitHub's Markdown turns into a link."""
LONGEST_KEY = 200
"""Characters of the names in an artifact's key."""
LONGEST_ASSET = 512
"""Characters of an asset's key, which Prefect allows."""
HASH = re.compile("[0-9a-f]{6}")
"""The end of a key that does not show its names completely."""
TEXT_LENGTH = 200
"""Characters of an answer or a message on a page."""
MAX_LINES = 20
"""The most lines that could not be read that the report lists."""
PHASES = {
    "check": "checking the call, the source and its keys",
    "first_row": "start to the first row sent",
    "read": "reading rows and making prompts (while others are processed)",
    "answer": "first row sent to last answer",
    "commit": "commits (while others are processed)",
    "total": "total",
}


@contextmanager
def warn_if_not_displayed(what: str) -> Iterator[None]:
    """Log a warning if Prefect's server is down: a failed display must not fail the run.

    Args:
        what: The name of the artifact in the warning.
    """
    try:
        yield
    # RuntimeError: the server held an update until after the run, when Prefect has closed the run's client.
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        logger.warning("%s could not be displayed in the Prefect UI: %s", what, error)


class ProgressArtifact:
    """A progress artifact that is updated every few seconds.

    Updates are sent by a thread: while Prefect's server is down, its client retries for a minute, and no
    commit may wait for that.
    """

    def __init__(self, predict_id: str) -> None:
        self._key = f"{slug(predict_id)}-progress"
        self._artifact: UUID | None = None
        self._shown = float("-inf")
        self._sending: threading.Thread | None = None

    def show(self, progress: Progress, *, last: bool = False) -> None:
        """Update the artifact if the last update is old enough.

        Args:
            progress: The progress of the run.
            last: The run has ended: update in any case, to 100 %.
        """
        if not last and time.monotonic() - self._shown < UPDATED_EVERY:
            return
        if self._sending is not None:
            self._sending.join(LAST_UPDATE_TIMEOUT if last else 0)
            if self._sending.is_alive():
                return
        self._shown = time.monotonic()
        # Prefect finds the flow run in the context of the thread.
        work = partial(contextvars.copy_context().run, self._send, progress, last)
        self._sending = threading.Thread(target=work, name="vllm-tasks-progress", daemon=True)
        self._sending.start()
        if last:
            self._sending.join(LAST_UPDATE_TIMEOUT)

    def _send(self, progress: Progress, last: bool) -> None:
        percent = min(100.0 * progress.done / progress.to_process, 100.0) if progress.to_process else 0.0
        percent = 100.0 if last and not progress.stopped_by else percent
        with warn_if_not_displayed("progress"):
            if self._artifact is None:
                created = create_progress_artifact(percent, self._key, str(progress))
                assert isinstance(created, UUID), "called from synchronous code"
                self._artifact = created
            else:
                update_progress_artifact(self._artifact, percent, str(progress))


def show_page(markdown: str, key: str, description: str) -> None:
    """Create a Markdown artifact.

    Args:
        markdown: The page.
        key: Its key.
        description: A plain text, with foreign text in it; the Prefect UI reads it as Markdown.
    """
    create_markdown_artifact(markdown, key, plain_lines(description))


def show_table(rows: Sequence[Mapping[str, object]], key: str, description: str) -> None:
    """Create a table artifact, whose texts the Prefect UI reads as Markdown.

    Args:
        rows: The rows: plain texts, with foreign text in them, and numbers.
        key: Its key.
        description: A plain text, as for `show_page`.
    """
    table = [
        {name: plain_lines(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]
    create_table_artifact(table, key, plain_lines(description))


def plain_lines(text: str) -> str:
    """Return foreign text as Markdown that shows it; lines that Markdown would change are code spans."""
    return "\n".join(
        code(line) if MARKUP.search(line) or ADDRESS.search(line) else printable(line)
        for line in text.split("\n")
    )


def show_report(report: Report) -> None:
    """Create a Markdown artifact of the report, and table artifacts of errors and of rows for review."""
    with warn_if_not_displayed("the report"):
        show_page(markdown_of(report), report_key(report.predict_id), str(report))
        if report.worst:
            table = [
                {
                    "key": display_key(row.key),
                    "cause": CAUSES[row.kind],
                    "message": printable(one_line(row.short_reason, MAX_MESSAGE)),
                }
                for row in report.worst
            ]
            words = f"{len(table)} of {report.failed:,} failed rows of {report.predict_id}"
            show_table(table, f"{slug(report.predict_id)}-errors", words)
        if report.reviews:
            table = [
                {
                    "key": display_key(row.key),
                    "label": printable(one_line(row.label, MAX_MESSAGE)),
                    "probability": f"{row.probability:.3f}",
                }
                for row in report.reviews
            ]
            words = f"{len(table)} of {report.to_review:,} rows for review of {report.predict_id}"
            show_table(table, reviews_key(report.predict_id), words)


def report_key(predict_id: str) -> str:
    """Return the key of the artifact of a report."""
    return f"{slug(predict_id)}-report"


def reviews_key(predict_id: str) -> str:
    """Return the key of the artifact of rows that a run has marked for a person."""
    return f"{slug(predict_id)}-reviews"


def validation_key(model: str, dataset: str) -> str:
    """Return the key of the artifact of a validation on one data set."""
    return f"{slug(model, dataset)}-validation"


def show_preview(preview: Preview) -> None:
    """Create a table artifact of a preview."""
    with warn_if_not_displayed("the preview"):
        words = f"{len(preview.rows)} rows of {preview.source}; nothing is committed"
        cells = [as_cells(row) for row in preview.rows]
        used = [name for name in cells[0] if any(row[name] for row in cells)] if cells else []
        table = [{name: row[name] for name in used} for row in cells]
        show_table(table, f"{slug(preview.model)}-preview", words)


def show_estimate(estimate: Estimate) -> None:
    """Create a Markdown artifact of an estimate."""
    with warn_if_not_displayed("the estimate"):
        rows = [(name, words(text)) for name, text in lines_of(estimate).items()]
        title = f"# {words(estimate.predict_id)}: estimate"
        markdown = f"{title}\n\n{markdown_table(('', ''), rows)}\n"
        described = f"{estimate.missing:,} of {estimate.rows:,} rows to process; nothing is committed"
        show_page(markdown, f"{slug(estimate.predict_id)}-estimate", described)


def markdown_of(report: Report) -> str:
    """Return the report as Markdown: causes of errors, sample answers, counts, tokens and seconds.

    Of the contents of rows it has the sample answers alone, since more people see artifacts than tables.
    """
    per_second = report.completion_tokens / max(report.seconds.get("answer", 0.0), 1e-3)
    counts = {
        "rows in the source": _number(report.rows),
        "up to date before": _number(report.up_to_date),
        "processed": _number(report.processed),
        "completed": _number(report.succeeded),
        "failed": _number(report.failed),
        "truncated at max_tokens": _number(report.truncated),
        "prompt tokens": _number(report.prompt_tokens),
        "completion tokens": f"{report.completion_tokens:,} ({per_second:,.0f} a second)",
        "commits": _number(report.commits),
    }
    if report.reasked:
        counts["attempted again, and repaired"] = f"{report.reasked:,}, {report.repaired:,}"
    if report.replaced:
        counts["outputs of an earlier prompt, sampling or model replaced"] = _number(report.replaced)
    if report.to_review:
        counts["marked for review"] = _number(report.to_review)
    if report.stopped_by:
        counts[f"left to the next run: stopped by {report.stopped_by}"] = _number(report.remaining)
    if report.unreadable:
        counts["lines that could not be read"] = _number(report.unreadable)
    if report.unreported_shards:
        counts["cancelled shards whose rows are not counted"] = _number(report.unreported_shards)
    seconds = {PHASES[p]: f"{report.seconds[p]:,.2f} s" for p in PHASES if p in report.seconds}
    served = ", ".join(f"{name} {value}" for name, value in report.served_by.items())
    parts = [
        f"# {words(report.predict_id)}",
        _errors(report) if report.errors else "No row failed.",
        *([_unreadable(report)] if report.unreadable_lines else []),
        *([_samples(report)] if report.samples else []),
        f"## Counts\n\nOutputs: {_link(report.outputs)}",
        markdown_table(("rows", ""), counts.items()),
        markdown_table(("time", ""), seconds.items()),
        f"Model `{cell(report.model)}`, fingerprint `{report.fingerprint[:16]}`"
        + (f", texts sent as {report.sent_as}" if report.sent_as else "")
        + (f", served by {words(served)}" if served else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _errors(report: Report) -> str:
    items = []
    for error in report.errors:
        example = one_line(report.example_of(error.kind), TEXT_LENGTH)
        texts = {"for example": example} if example else {}
        texts["keys"] = ", ".join(map(display_key, error.keys))
        rows = "row" if error.rows == 1 else "rows"
        items.append(listed(f"**{error.rows:,} {rows}: {cause_of(error.kind)}**", texts))
    return "## Errors\n\n" + "\n".join(items)


def _unreadable(report: Report) -> str:
    lines = (code(one_line(line, TEXT_LENGTH)) for line in report.unreadable_lines[:MAX_LINES])
    return "Lines that could not be read, for example:\n\n" + "\n".join(f"- {line}" for line in lines)


def _samples(report: Report) -> str:
    answers = ((display_key(s.key), one_line(s.answer, TEXT_LENGTH)) for s in report.samples)
    items = (listed(f"key {code(key)}", {"answer": answer}) for key, answer in answers)
    return "## Sample answers\n\n" + "\n".join(items)


def listed(head: str, texts: Mapping[str, str]) -> str:
    """Return an item of a list in Markdown, with foreign texts below it.

    Lines of a list wrap. Cells of a table do not in the Prefect UI, so a long text would make it too wide.

    Args:
        head: The first line, which is Markdown already.
        texts: The texts by name.
    """
    return "\n".join(
        [f"- {head}", *(f"  - {name}: {code(text) or '*empty*'}" for name, text in texts.items())]
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        head: The cells of the head.
        rows: The cells of each row, which are Markdown already.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Return text as a code span for a table's cell, where none of it is read as Markdown or HTML."""
    return f"`{cell(text)}`" if text.strip() else ""


def words(text: str) -> str:
    """Return foreign text for use outside of code spans, escaped so that no HTML, link or picture works.

    A text with an address in it is a code span, because the Prefect UI makes a link of a bare address.
    """
    if ADDRESS.search(text):
        return code(text)
    return re.sub(r"[\\<>&\[\]]", r"\\\g<0>", cell(text))


def _link(location: str) -> str:
    return f"<{location}>" if re.fullmatch(r"https?://[^\s<>]+", location) else f"`{cell(location)}`"


def _number(value: int | None) -> str:
    return "not counted" if value is None else f"{value:,}"


def cell(text: str) -> str:
    """Return text that ends neither a cell nor a code span; control characters and surrogates are escaped."""
    return printable(re.sub(r"[|`\s]", " ", text))


def slug(*names: str) -> str:
    """Return an artifact key for a name, or for several: lower-case letters, digits and dashes.

    A name of letters (a to z, in either case), digits, single dashes and spaces, which become dashes, is its
    own key. Any other character is lost, and six digits of the name's hash are added: Prefect takes artifacts
    with one key for versions of each other, which `m-a_b` and `m-a-b` are not. Characters that no identifier
    may have (`ODD`, line ends) count as spaces.

    Several names are joined by dashes. If other names would give the same text, a hash is added, too: model
    `a` on the set `b-c` is not model `a-b` on the set `c`. A key of more than `LONGEST_KEY` characters is
    shortened, and gets a hash as well.
    """
    given = [re.sub(rf"[\s{re.escape(ODD)}]+", "-", name.lower()) for name in names]
    joined = "-".join(given)
    plain = re.sub("[^a-z0-9]+", "-", joined).strip("-") or "outputs"
    # Of two names, the last dash separates them, unless the second one has dashes, or looks like a hash.
    dashless = given[1:] if len(given) == 2 else given if len(given) > 2 else []
    is_clear = not any("-" in name or HASH.fullmatch(name) for name in dashless)
    if plain == joined and is_clear and len(plain) <= LONGEST_KEY:
        return plain
    end = _hash(joined if is_clear else "\0".join(given))
    return f"{plain[: LONGEST_KEY - len(end) - 1].rstrip('-')}-{end}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]


def page_url(key: str) -> str | None:
    """Return the address of an artifact's page in the Prefect UI.

    Args:
        key: The key of the artifact; the page shows its versions, the newest first.

    Returns:
        The URL; None if no Prefect UI is known.
    """
    ui = PREFECT_UI_URL.value()
    return f"{ui}/artifacts/key/{key}" if ui else None


def asset_key(location: str) -> str:
    """Return an asset key for the location of a table: a URI without spaces and a few other characters.

    Args:
        location: The location, as the report has it.

    Returns:
        The URI, without the user and password of a database. If characters are lost, a hash is added, so that
        two tables are not one asset.
    """
    if table := re.fullmatch(r"table (\S+) in (\w+)(?:\+\w+)?://(?:[^/@]*@)?(.*)", location):
        location = f"{table[2]}://{table[3]}/{table[1]}"
    uri = location if re.match(r"[a-z][a-z0-9+.-]*://", location) else f"file://{location}"
    plain = re.sub(r"""[^A-Za-z0-9_.:/@=,;+~()!*$-]""", "_", uri)
    if plain == uri and len(uri) <= LONGEST_ASSET:
        return uri
    return f"{plain[: LONGEST_ASSET - 7]}~{_hash(uri)}"
