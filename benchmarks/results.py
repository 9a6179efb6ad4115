"""`RESULTS.md`: figures as the commands wrote them, each in a part of its own."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).with_name("RESULTS.md")
PARTS = ("Peers", "Peers when things go wrong", "Window", "Overload", "Faults", "Long run")
"""In the order of the page."""
HEAD = """\
# Results

Written by the commands that each part names, never by hand; a command writes its own part anew.
"""
GIB = 2**30
PATH = re.compile(r"(?<![\w./])/\S*/(?=\S)")
"""Where a file lies is nobody's business."""


def record(part: str, command: str, body: str, packages: Sequence[str] = (), file: Path = FILE) -> None:
    """Write the part of the page: what was measured where, then `body` (Markdown, headings from ###)."""
    parts = read(file)
    parts[part] = f"{circumstances(command, packages)}\n\n{body.strip()}"
    sections = [f"## {name}\n\n{parts[name]}\n" for name in PARTS if name in parts]
    file.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def read(file: Path = FILE) -> dict[str, str]:
    """The parts of the page by their names; empty where there is no page."""
    if not file.exists():
        return {}
    _, *sections = re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: body.strip() for name, _, body in (section.partition("\n") for section in sections)}


def circumstances(command: str, packages: Sequence[str]) -> str:
    """One sentence: the command, the day, the commit, the machine and the versions."""
    command = PATH.sub("", command)
    versions = ", ".join(f"{name} {found}" for name in packages if (found := version_of(name)))
    return (
        f"`{command}` on {datetime.now(UTC):%Y-%m-%d}, commit {commit()}: {machine()}; "
        f"Python {platform.python_version()}{', ' if versions else ''}{versions}."
    )


def machine() -> str:
    """Cores, processor, memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, {memory:.0f} GiB"


@cache
def commit() -> str:
    """The commit as it is at the first call, with a word when the tree has changes beside the page.

    Called before anything is measured: the tree may be at another one when the page is written.
    """
    git = ["git", "-C", str(FILE.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    own = (FILE.name, FILE.with_suffix(".svg").name)
    dirty = any(not line.endswith(own) for line in changed.stdout.splitlines())
    return head.stdout.strip() + (" with changes" if dirty else "")


def version_of(package: str) -> str | None:
    """Its version here, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    bars = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, bars, *rows])


def one_line(words: str, most: int = 160) -> str:
    """An error in a cell of a table, without paths of this machine."""
    return PATH.sub("", " ".join(words.split()))[:most].replace("|", "/")
