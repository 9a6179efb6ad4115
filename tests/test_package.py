"""The package from outside: its imports, their time, and its public names."""

from __future__ import annotations

import subprocess
import sys

import vllm_tasks
from tests.eventually import LONG_ENOUGH
from vllm_tasks import errors

PUBLIC = [
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
HEAVY = ("vllm", "ray", "torch", "transformers", "numpy", "pandas", "pyarrow", "duckdb", "deltalake")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_ENOUGH)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    """Adding or removing a public name is a decision that is made here."""
    assert sorted(vllm_tasks.__all__) == sorted(PUBLIC)
    assert not [name for name in PUBLIC if not hasattr(vllm_tasks, name)]


def test_importing_loads_nothing_heavy() -> None:
    """vLLM and its dependencies are not loaded, except those that Prefect itself loads."""
    code = "import sys, prefect, prefect.main; before = set(sys.modules); import vllm_tasks; "
    code += f"print([m for m in {HEAVY} if m in sys.modules and m not in before])"
    assert python(code).strip() == "[]"


def test_errors_are_caught_by_what_the_caller_does_next() -> None:
    """There is one root with four kinds, each also a fitting standard exception."""
    kinds = {
        errors.InvalidCall: ValueError,
        errors.ServerUnavailable: ConnectionError,
        errors.EngineFailed: RuntimeError,
        errors.RowErrors: Exception,
    }
    for kind, standard in kinds.items():
        assert issubclass(kind, errors.VllmTasksError)
        assert issubclass(kind, standard)
