"""Adds the picture of `benchmarks/RESULTS.md` to the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PICTURE = Path(__file__).parent.parent / "benchmarks" / "RESULTS.svg"


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    files.append(File.generated(config, f"project/{PICTURE.name}", abs_src_path=str(PICTURE)))
    return files
