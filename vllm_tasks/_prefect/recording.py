"""What a step sends to Prefect: the values of a validation into the saved block, and events."""

from __future__ import annotations

import logging
import threading
from typing import Any
from uuid import UUID

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from pydantic import ValidationError

from vllm_tasks.calls.classes import Classes
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.tables import Report
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

SAVING = threading.Lock()
"""Data sets validated at once update the same block, each by a read and a write. Without the lock, one would
overwrite the values of another."""


ANSWERS_DEPEND_ON = {*Predictor.model_fields, "model", "api_url", "model_name", "vllm_kwargs"} - {
    *("uuid", "db", "keep", "model_update_kwargs", "compute_kwargs", "validation", "metric_values"),
    "max_batch_size",
}
"""A validated model that differs from its block in one of these fields is not the saved one."""


def save_metric_values(model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    """Save the values in the block that `model` was loaded from, beside those of other data sets.

    Args:
        model: The model; if it is not from a saved block, or was changed since so that it may answer
            otherwise, the block stays as it is.
        report: The report with the values.
    """
    if (block := model._block_document_id) is None:
        return
    try:
        _save(block, model, report)
    # Deleted, say, or it cannot be loaded here. The event and the gate matter more.
    except (httpx.HTTPError, PrefectException, ValidationError) as error:
        logger.warning("the block %s could not be updated with metric_values: %s", block, error)


def _save(block: UUID, model: VllmAPI | VllmModel, report: ValidationReport) -> None:
    with SAVING, get_client(sync_client=True) as client:
        saved = client.read_block_document(block)
        if changed := _changed(model, Block._from_block_document(saved)):
            logger.warning(
                "metric_values are not saved in the block %r: the validated model differs from it in %s",
                saved.name,
                ", ".join(changed),
            )
            return
        # An update has to name the blocks that this one refers to: Prefect removes the others.
        data: dict[str, Any] = {
            field: {"$ref": {"block_document_id": str(found["block_document"]["id"])}}
            for field, found in saved.block_document_references.items()
        }
        data["metric_values"] = {**saved.data.get("metric_values", {}), **report.metric_values}
        client.update_block_document(block, BlockDocumentUpdate(data=data))


def _changed(model: Block, saved: Block) -> list[str]:
    """The fields by which the answers of two models may differ; a served one has no engine arguments."""
    shared = ANSWERS_DEPEND_ON & type(model).model_fields.keys() & type(saved).model_fields.keys()
    one, other = (each.model_dump(include=shared) for each in (model, saved))
    return [name for name in type(model).model_fields if name in shared and one[name] != other[name]]


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
