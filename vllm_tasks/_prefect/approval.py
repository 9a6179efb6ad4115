"""A person's decision about a model that is below its limits: the flow run pauses until it is there."""

from __future__ import annotations

import logging
from typing import Literal

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed
from pydantic import Field

from vllm_tasks._prefect.recording import emit
from vllm_tasks.artifacts import page_url, slug, validation_key, words
from vllm_tasks.errors import GateFailed, InvalidCall
from vllm_tasks.printable import one_line, printable
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

POLLED_EVERY = 5
"""Seconds between two looks at whether the flow run was resumed."""
REASON_LENGTH = 500
"""Characters of each reason that the question repeats."""


class Decision(RunInput):
    """The form with which a person resumes the flow run."""

    decision: Literal["approved", "rejected"] = Field(
        title="Decision", description="approved: the flow run completes. rejected: it fails."
    )
    name: str = Field(
        min_length=1, max_length=100, title="Your name", description="It is recorded with the decision."
    )
    comment: str = Field(
        default="", max_length=1000, title="Comment", description="Why; it is recorded with the decision."
    )

    def __str__(self) -> str:
        comment = f": {self.comment}" if self.comment else ""
        return printable(f"{self.decision} by {self.name}{comment}")


def check_askable() -> None:
    """Check that a person can be asked from here.

    Raises:
        InvalidCall: This is not a flow run, or there is no Prefect server at which a person could resume it.
    """
    if FlowRunContext.get() is None or not PREFECT_API_URL.value():
        raise InvalidCall(
            'on_gate_failed="ask" pauses a flow run until a person resumes it, and this is not a flow run of '
            "a Prefect server: start one (prefect server start), set PREFECT_API_URL and call the flow, or "
            'use on_gate_failed="fail"'
        )


def approved(failed: GateFailed, timeout: int) -> State[ValidationReport]:
    """Pause the flow run until a person has decided about a model that did not pass.

    Args:
        failed: The error of the gate, with the report.
        timeout: Seconds to wait for the decision.

    Returns:
        The state of a flow run that completes, with the report and a message that names the person.

    Raises:
        GateFailed: The person rejected the model, or nobody decided in time.
    """
    report = failed.report
    # A retry of the flow run asks again, unless it resumed the same validation.
    key = slug("-".join(dataset.run for dataset in report.datasets))[:100]
    question = Decision.with_initial_data(description=_question(report))
    try:
        decision = pause_flow_run(
            wait_for_input=question, timeout=timeout, poll_interval=POLLED_EVERY, key=f"approval-{key}"
        )
    except FlowPauseTimeout as error:
        raise GateFailed(f"{failed}; nobody decided within {timeout:,} s", report) from error
    if decision.decision == "rejected":
        raise GateFailed(f"{failed}; {decision}", report)
    logger.warning("%s, %s", failed, decision)
    decided = {"name": decision.name, "comment": decision.comment, "reasons": report.reasons}
    emit("validation.approved", report.model, decided)
    return Completed(message=f"{failed}; {decision}", data=report)


def _question(report: ValidationReport) -> str:
    """The description of the form in Markdown: why the model did not pass, and where its pages are."""
    lines = [f"{words(report.model)} did not pass its validation:"]
    lines += [f"- {words(one_line(reason, REASON_LENGTH))}" for reason in report.reasons]
    for dataset in report.datasets:
        key = validation_key(report.model, dataset.dataset)
        page = page_url(key)
        lines.append(f"- report: [{key}]({page})" if page else f"- report: the artifact {key}")
    return "\n".join(lines)
