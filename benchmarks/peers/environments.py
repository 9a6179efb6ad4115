"""Where a peer has needs of its own: environments beside ours, made at first use from plain pins.

`constraints/peers-<name>.txt` has the pins; an environment is made anew when they are newer. Without
network only the configured package registry is asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "curator": ("bespokelabs-curator",),
    "datatrove": ("datatrove", "aiofiles", "aiosqlite", "httpx", "orjson", "xxhash"),
    "distilabel": ("distilabel[openai]", "requests"),
    "ray": ("pandas",),
}
"""What each is made of; Ray Data needs pandas beside what we have, which an overlay adds."""


OVERLAY = "ray"


def prepare(name: str) -> None:
    """Make it unless it is there: before the start-up of a peer is timed."""
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
    """Put what Ray Data needs before what is ours, in this process and in all that it starts."""
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
    # uv knows a folder of wheels by another name than pip.
    links = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True, env={**links, **os.environ})
