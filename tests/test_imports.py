"""No file of the package imports itself indirectly, not even in a function or for types alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vllm_tasks

ROOT = Path(vllm_tasks.__file__).parent
FILES = {
    ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """The files of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in (inner if inner in FILES else node.module,) if name in FILES)


def test_a_room_imports_only_rooms_on_the_floors_below_it() -> None:
    """The floors are listed in pyproject.toml; flows for deployments import public names only."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    linted = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert linted.returncode == 0, linted.stdout


def test_no_import_leads_back() -> None:
    """The imports of the package's files have an order."""
    graph = {name: set(imported(path)) - {name} for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > len(graph)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import loop: {' <- '.join(error.args[1])}")
