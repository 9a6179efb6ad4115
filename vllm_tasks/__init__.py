"""vLLM from Prefect: prompt a model over rows, on a server or in an engine of one's own.

The names below are the public interface. Importing them loads neither vLLM nor torch nor Ray.
"""

from vllm_tasks.calls.answers import Artifact
from vllm_tasks.calls.datatypes import DataType
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import (
    EngineFailed,
    GateFailed,
    InvalidCall,
    RowErrors,
    ServerUnavailable,
    TablesUnavailable,
    TooManyFailed,
    VllmTasksError,
)
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.rows import Choice, Completion, RowError, TokenLogprob
from vllm_tasks.serving.api import serve
from vllm_tasks.settings import Settings
from vllm_tasks.tables.previews import Preview, PreviewRow
from vllm_tasks.tables.report import ErrorKind, FailedRow, Report
from vllm_tasks.tasks import compare, completions, predict, predict_batches, predict_in_db, preview, validate
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.report import Comparison, DatasetReport, ValidationReport

__all__ = [
    "Artifact",
    "Choice",
    "Comparison",
    "Completion",
    "DataType",
    "Datalayer",
    "Dataset",
    "DatasetReport",
    "EngineFailed",
    "ErrorKind",
    "FailedRow",
    "GateFailed",
    "InvalidCall",
    "Metric",
    "Preview",
    "PreviewRow",
    "Report",
    "RowError",
    "RowErrors",
    "ServerUnavailable",
    "Settings",
    "TablesUnavailable",
    "TokenLogprob",
    "TooManyFailed",
    "Validation",
    "ValidationReport",
    "VllmAPI",
    "VllmModel",
    "VllmTasksError",
    "compare",
    "completions",
    "predict",
    "predict_batches",
    "predict_in_db",
    "preview",
    "serve",
    "validate",
]
