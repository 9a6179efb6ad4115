"""Fixtures: a lake with a source table of ten rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datalayer.lake.rows import ROWS, jsonl
from vllm_tasks.datalayer.lake.lake import Lake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "t.jsonl", ROWS)
    return tmp_path


@pytest.fixture
def lake(folder: Path) -> Iterator[Lake]:
    opened = Lake(str(folder))
    yield opened
    opened.close()
