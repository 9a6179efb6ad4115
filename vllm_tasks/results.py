"""The types that calls return, for annotations and `isinstance`."""

from vllm_tasks.rows import Choice, Completion, RowError, TokenLogprob
from vllm_tasks.tables import (
    ErrorKind,
    Estimate,
    FailedRow,
    Preview,
    PreviewRow,
    Report,
    ReviewRow,
    Sample,
    Total,
)
from vllm_tasks.validation.reference import ReferenceSet
from vllm_tasks.validation.report import Comparison, DatasetReport, ValidationReport

__all__ = [
    "Choice",
    "Comparison",
    "Completion",
    "DatasetReport",
    "ErrorKind",
    "Estimate",
    "FailedRow",
    "Preview",
    "PreviewRow",
    "ReferenceSet",
    "Report",
    "ReviewRow",
    "RowError",
    "Sample",
    "TokenLogprob",
    "Total",
    "ValidationReport",
]
