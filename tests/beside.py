"""pandas for the tests that need it; the Makefile says why it is not in the environment itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

BESIDE = str(Path(sys.prefix) / "beside")


def pandas() -> Any:
    """The module."""
    if BESIDE not in sys.path:
        sys.path.append(BESIDE)
    return importlib.import_module("pandas")


def in_pandas(table: pa.Table) -> Any:
    """`table` as a DataFrame of pandas."""
    pandas()
    return table.to_pandas()
