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
from vllm_tasks.validation.report import (
    Against,
    ChangedRow,
    Comparison,
    DatasetReport,
    Record,
    Standing,
    ValidationReport,
    Value,
    Verdict,
    WorstRow,
)

__all__ = [
    "Against",
    "ChangedRow",
    "Choice",
    "Comparison",
    "Completion",
    "DatasetReport",
    "ErrorKind",
    "Estimate",
    "FailedRow",
    "Preview",
    "PreviewRow",
    "Record",
    "ReferenceSet",
    "Report",
    "ReviewRow",
    "RowError",
    "Sample",
    "Standing",
    "TokenLogprob",
    "Total",
    "ValidationReport",
    "Value",
    "Verdict",
    "WorstRow",
]
