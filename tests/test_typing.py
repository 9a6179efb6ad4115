"""The view of a type checker on the public tasks and methods: here pyright, in `make check` mypy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent / "typing"
OPTIONS = {"typeCheckingMode": "standard", "enableTypeIgnoreComments": False}


def test_pyright_has_nothing_to_say_of_a_right_flow_and_finds_each_mistake(tmp_path: Path) -> None:
    """Results have types, and arguments that are misspelt or of another type are found."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(OPTIONS))
    checker = Path(sys.executable).with_name("basedpyright")
    command = [checker, "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    lines = (HERE / "wrong.py").read_text().splitlines()
    mistakes = {("wrong.py", i) for i, line in enumerate(lines) if "# type: ignore" in line}
    assert {(Path(e["file"]).name, e["range"]["start"]["line"]) for e in errors} == mistakes
