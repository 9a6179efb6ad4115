"""The view of type checkers on the public tasks and methods, as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "typing"
BIN = Path(sys.executable).parent
Checker = Callable[[Path], set[tuple[str, int]]]


def mypy(folder: Path) -> set[tuple[str, int]]:
    """The files and lines in which mypy finds an error."""
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent", "--output=json"]
    command = [
        sys.executable,
        "-m",
        "mypy",
        *options,
        f"--cache-dir={folder / 'cache'}",
        *folder.glob("*.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(Path(error["file"]).name, error["line"]) for error in found if error["severity"] == "error"}


def pyright(folder: Path) -> set[tuple[str, int]]:
    """The files and lines in which pyright finds an error, by its usual rules."""
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    command = [BIN / "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = [(Path(error["file"]).name, error["range"]["start"]["line"] + 1, error) for error in found]
    return {(name, line) for name, line, error in lines if error["severity"] == "error"}


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_right_flow_has_no_error_and_each_mistake_has_one(checker: Checker, tmp_path: Path) -> None:
    """Results have types, and arguments that are misspelt or of another type are found."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    lines = (HERE / "wrong.py").read_text().splitlines()
    marked = {("wrong.py", number) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert checker(tmp_path) == marked
