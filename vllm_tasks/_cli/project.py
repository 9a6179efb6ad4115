"""A folder to start with, for people who have the package and no clone: deployments, a flow, a README."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_tasks.errors import InvalidCall

TEMPLATE = Path(__file__).with_name("template")
FILES = ("README.md", "prefect.yaml", "tickets.py", "data/tickets.csv")
"""Listed, since an installer puts compiled files beside them."""


def write(folder: Path) -> list[Path]:
    """Copy the files of the template into a folder, which is created unless it exists; returns the copies.

    Raises:
        InvalidCall: A file is there already, or the folder cannot be written; nothing is overwritten.
    """
    if there := [name for name in FILES if os.path.lexists(folder / name)]:
        raise InvalidCall(
            f"{folder} has {', '.join(there)} already, and nothing is overwritten: name another folder, or "
            "move them away"
        )
    if (data := folder / "data").is_symlink():
        raise InvalidCall(
            f"{data} is a link, and nothing is written behind it: name another folder, or move it away"
        )
    try:
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                file.write((TEMPLATE / name).read_bytes())
    except OSError as error:
        raise InvalidCall(f"{folder} cannot be written: {error}") from error
    return [folder / name for name in FILES]
