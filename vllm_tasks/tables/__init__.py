"""Predictions over the rows of a table: one committed output or error for each row."""

from vllm_tasks.tables.batch_files import export_batch, export_batch_results
from vllm_tasks.tables.estimates import Estimate, estimate
from vllm_tasks.tables.log import Log, Terminal
from vllm_tasks.tables.predict import predict_in_db
from vllm_tasks.tables.previews import Preview, PreviewRow, preview
from vllm_tasks.tables.report import ErrorKind, FailedRow, Report, ReviewRow, Sample
from vllm_tasks.tables.totals import Total

__all__ = [
    "ErrorKind",
    "Estimate",
    "FailedRow",
    "Log",
    "Preview",
    "PreviewRow",
    "Report",
    "ReviewRow",
    "Sample",
    "Terminal",
    "Total",
    "estimate",
    "export_batch",
    "export_batch_results",
    "predict_in_db",
    "preview",
]
