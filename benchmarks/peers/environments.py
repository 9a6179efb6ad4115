"""Separate environments for peers with other requirements, created at first use from pinned versions.

`constraints/peers-<name>.txt` has the pins; an environment is created again if they are newer. Packages come
from the configured package registry only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "curator": ("bespokelabs-curator",),
    "daft": ("daft[openai]",),
    "datatrove": ("datatrove", "aiofiles", "aiosqlite", "httpx", "orjson", "xxhash"),
    "distilabel": ("distilabel[openai]", "requests"),
    "ray": ("pandas",),
}
"""The packages of each environment; Ray Data needs only pandas in addition to ours, which an overlay adds."""


OVERLAY = "ray"


def prepare(name: str) -> None:
    """Create an environment if it is missing; call this before the start-up of a peer is timed."""
    folder, install = folder_of(name), ("pip", "install", "--quiet", "--compile-bytecode")
    if not is_stale(name):
        return
    if name == OVERLAY:
        uv(*install, "--target", str(folder), "--python", sys.executable, "--no-deps", *wanted(name))
    else:
        uv("venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
        uv(*install, "--python", str(folder), *wanted(name))
    (folder / ".ready").touch()


def interpreter(name: str) -> Path:
    """The Python of a peer's environment."""
    prepare(name)
    return folder_of(name) / "bin" / "python"


def overlay() -> None:
    """Put the overlay for Ray Data before our packages, in this process and in those that it starts."""
    prepare(OVERLAY)
    folder = folder_of(OVERLAY)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def wanted(name: str) -> tuple[str, ...]:
    return ("--constraints", str(pins(name)), *PACKAGES[name])


def folder_of(name: str) -> Path:
    return ROOT / f".venv-peers-{name}"


def pins(name: str) -> Path:
    return ROOT / "constraints" / f"peers-{name}.txt"


def is_stale(name: str) -> bool:
    ready = folder_of(name) / ".ready"
    return not ready.exists() or ready.stat().st_mtime < pins(name).stat().st_mtime


def uv(*arguments: str) -> None:
    # uv's variable for a folder of wheels has another name than pip's.
    links = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True, env={**links, **os.environ})
