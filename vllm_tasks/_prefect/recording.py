"""What a validation found, told to Prefect: values in the saved block, and an event."""

from __future__ import annotations

import logging
import threading
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound

from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

SAVING = threading.Lock()
"""Values of several data sets may be found at once, and go into one block."""


def save_metric_values(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Put the values into the saved block that `model` came from, beside those of other data sets."""
    if (block := model._block_document_id) is None:
        return
    with SAVING, get_client(sync_client=True) as client:
        try:
            saved = client.read_block_document(block)
        except ObjectNotFound:
            logger.warning("the block %s is gone: its metric_values are not updated", block)
            return
        # An update has to name the blocks that this one refers to, or Prefect takes them out.
        data: dict[str, Any] = {
            field: {"$ref": {"block_document_id": str(found["block_document"]["id"])}}
            for field, found in saved.block_document_references.items()
        }
        data["metric_values"] = {**saved.data.get("metric_values", {}), **report.metric_values}
        client.update_block_document(block, BlockDocumentUpdate(data=data))


def emit_verdict(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Tell Prefect's automations: the event `vllm-tasks.validation.passed` or `.failed`, with the values."""
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
