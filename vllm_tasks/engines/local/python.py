"""The Python environment that has vLLM: this process's own, or another one beside it."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from vllm_tasks.errors import EngineFailed

WHERE = (
    "import importlib.util as i; s = i.find_spec('vllm'); print(s.submodule_search_locations[0] if s else '')"
)
"""Prints the folder of the installed vLLM, without importing it."""
INTERPRETER_TIMEOUT = 60.0
"""Seconds for an interpreter to start and print where its vLLM is."""


def interpreter(given: str) -> str:
    """Return the absolute path of the interpreter `given`, or of this process's if it is empty.

    Raises `EngineFailed` if there is no such program on this machine.
    """
    if not given:
        return sys.executable
    path = Path(given).expanduser()
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise EngineFailed(
            f"engine_python={given!r} is not a program on this machine: give the path of the Python in the "
            "environment that has vLLM, such as /opt/vllm/bin/python"
        )
    return os.path.abspath(path)  # a link into an environment must not be resolved


def environment(python: str) -> dict[str, str]:
    """Return the environment variables for a program that `python` runs."""
    inherited = dict(os.environ)
    if python != sys.executable:
        inherited.pop("PYTHONHOME", None)  # it is of this process's interpreter
        # As if the environment were activated: vLLM compiles with programs that are installed there (ninja).
        inherited["PATH"] = os.pathsep.join([os.path.dirname(python), os.environ.get("PATH", os.defpath)])
    return inherited


@functools.cache
def source_of_vllm(given: str) -> Path | None:
    """Return the folder of vLLM's source in the environment of `given`.

    None if that environment is not on this machine, or has no vLLM.
    """
    if not given:  # another process would add its start to that of every flow
        spec = importlib.util.find_spec("vllm")
        return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    try:
        python = interpreter(given)
        asked = subprocess.run(  # noqa: S603 - a program that the site or the model names
            [python, "-P", "-c", WHERE],
            env=environment(python),
            capture_output=True,
            text=True,
            check=True,
            timeout=INTERPRETER_TIMEOUT,
        )
    except (EngineFailed, OSError, subprocess.SubprocessError):
        return None
    return Path(asked.stdout.strip()) if asked.stdout.strip() else None
