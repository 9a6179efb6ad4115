"""Fixtures for sources that are files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.datalayer.sources.text_files import Write
from vllm_tasks.datalayer.sources.data_file import DataFile


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a data file of this name and content."""

    def made(name: str, content: str | bytes) -> DataFile:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        file = DataFile.of(LocalFileSystem(), str(path), name)
        assert file is not None
        return file

    return made
