"""The result of a validation in Prefect: values in the saved block, and an event."""

from __future__ import annotations

import logging
import threading
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound, PrefectException

from vllm_tasks.models import VllmAPI, VllmModel
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
    except (httpx.HTTPError, PrefectException) as error:  # the event and the gate matter more
        logger.warning("the block %s could not be updated with metric_values: %s", block, error)


def _save(block: UUID, report: ValidationReport) -> None:
    with SAVING, get_client(sync_client=True) as client:
        try:
            saved = client.read_block_document(block)
        except ObjectNotFound:
            logger.warning("the block %s was deleted: its metric_values are not updated", block)
            return
        # An update has to name the blocks that this one refers to: Prefect removes the others.
        data: dict[str, Any] = {
            field: {"$ref": {"block_document_id": str(found["block_document"]["id"])}}
            for field, found in saved.block_document_references.items()
        }
        data["metric_values"] = {**saved.data.get("metric_values", {}), **report.metric_values}
        client.update_block_document(block, BlockDocumentUpdate(data=data))


def emit_verdict(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Send the event `vllm-tasks.validation.passed` or `.failed`, with the values, for automations."""
    emit_event(
        event=f"vllm-tasks.validation.{'passed' if report.passed else 'failed'}",
        resource={
            "prefect.resource.id": f"vllm-tasks.model.{model.identifier}",
            "prefect.resource.name": model.identifier,
        },
        payload={
            "metric_values": report.metric_values,
            "reasons": report.reasons,
            "runs": {dataset.dataset: dataset.run for dataset in report.datasets},
        },
    )
