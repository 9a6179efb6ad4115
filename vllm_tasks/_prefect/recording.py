"""What a step sends to Prefect: the values of a validation into the saved block, and events."""

from __future__ import annotations

import logging
import threading
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.events import emit_event
from prefect.exceptions import PrefectException

from vllm_tasks.calls.classes import Classes
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.tables import Report
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

SAVING = threading.Lock()
"""Data sets validated at once update the same block, each by a read and a write. Without the lock, one would
overwrite the values of another."""


def save_metric_values(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Save the values in the block that `model` was loaded from, beside those of other data sets.

    Args:
        model: The model; if it is not from a saved block, nothing is done.
        report: The report with the values.
    """
    if (block := model._block_document_id) is None:
        return
    try:
        _save(block, report)
    except (httpx.HTTPError, PrefectException) as error:  # deleted, say; the event and the gate matter more
        logger.warning("the block %s could not be updated with metric_values: %s", block, error)


def _save(block: UUID, report: ValidationReport) -> None:
    with SAVING, get_client(sync_client=True) as client:
        saved = client.read_block_document(block)
        # An update has to name the blocks that this one refers to: Prefect removes the others.
        data: dict[str, Any] = {
            field: {"$ref": {"block_document_id": str(found["block_document"]["id"])}}
            for field, found in saved.block_document_references.items()
        }
        data["metric_values"] = {**saved.data.get("metric_values", {}), **report.metric_values}
        client.update_block_document(block, BlockDocumentUpdate(data=data))


def emit_verdict(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Send the event `vllm-tasks.validation.passed` or `.failed`, with the values, for automations."""
    payload = {
        "metric_values": report.metric_values,
        "reasons": report.reasons,
        "runs": {dataset.dataset: dataset.run for dataset in report.datasets},
    }
    emit(f"validation.{'passed' if report.passed else 'failed'}", model.identifier, payload)


def emit_reviews(model: VllmAPI | VllmModel, report: Report) -> None:
    """Send the event `vllm-tasks.reviews.requested`, with their number, if rows are marked for a person."""
    if not report.to_review or not isinstance(model.datatype, Classes):
        return
    payload = {name: getattr(report, name) for name in ("predict_id", "to_review", "source", "outputs")}
    emit("reviews.requested", model.identifier, {**payload, "review_below": model.datatype.review_below})


def emit(event: str, model: str, payload: dict[str, Any]) -> None:
    """Send the event `vllm-tasks.<event>` about the model with this identifier."""
    resource = {"prefect.resource.id": f"vllm-tasks.model.{model}", "prefect.resource.name": model}
    emit_event(event=f"vllm-tasks.{event}", resource=resource, payload=payload)
