"""vLLM steps for Prefect: prompt a model over rows, on a server or in a local engine.

Most flows need only the names below. Exceptions are in `vllm_tasks.errors`, result types in
`vllm_tasks.results`, more tasks in `vllm_tasks.tasks`, and flows to deploy in `vllm_tasks.flows`. Importing
them loads neither vLLM nor torch nor Ray.
"""

from importlib.metadata import version as _version

from vllm_tasks.calls.answers import Artifact
from vllm_tasks.calls.batch_request import batch_request
from vllm_tasks.calls.classes import Classes
from vllm_tasks.calls.datatypes import DataType
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import GateFailed, InvalidCall
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.rows import Request, RowError
from vllm_tasks.serving import serve
from vllm_tasks.tables import export_batch, export_batch_results
from vllm_tasks.tasks import (
    compare,
    completions,
    estimate,
    predict,
    predict_batches,
    predict_in_db,
    preview,
    validate,
)
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.reference import reference_set

__version__ = _version("vllm-tasks")

__all__ = [
    "Artifact",
    "Classes",
    "DataType",
    "Datalayer",
    "Dataset",
    "GateFailed",
    "InvalidCall",
    "Metric",
    "Request",
    "RowError",
    "Validation",
    "VllmAPI",
    "VllmModel",
    "batch_request",
    "compare",
    "completions",
    "estimate",
    "export_batch",
    "export_batch_results",
    "predict",
    "predict_batches",
    "predict_in_db",
    "preview",
    "reference_set",
    "serve",
    "validate",
]
