"""`RESULTS.md`: the figures that commands write, each command to a part of its own."""

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
PARTS = (
    "Peers",
    "Peers with an engine each",
    "Peers and rows that differ",
    "Peers that embed and score",
    "Peers as clients of one server",
    "Peers after a crash",
    "Window",
    "Overload",
    "Coverage of intervals",
    "Gate",
    "Parity",
    "Faults",
    "Long run",
    "Scale",
)
"""The parts, in the order of the page; others, of a newer version, stand behind them."""
HEAD = """\
# Results

Each part names the command that writes it. No figure is written by hand; a command replaces its own part.
"""
GIB = 2**30
PATH = re.compile(r"(?<![\w./])/\S*/(?=\S)")
"""The folders of a path, which are left out: pages do not show where files are."""


def record(part: str, command: str, body: str, packages: Sequence[str] = (), file: Path = FILE) -> None:
    """Write a part of the page: the circumstances, then `body` (Markdown, headings from ###)."""
    parts = read(file)
    parts[part] = f"{circumstances(command, packages)}\n\n{body.strip()}"
    sections = [f"## {name}\n\n{parts[name]}\n" for name in dict.fromkeys((*PARTS, *parts)) if name in parts]
    file.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def read(file: Path = FILE) -> dict[str, str]:
    """The parts of the page by name; empty if there is no page."""
    if not file.exists():
        return {}
    _, *sections = re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: body.strip() for name, _, body in (section.partition("\n") for section in sections)}


def circumstances(command: str, packages: Sequence[str]) -> str:
    """The command, the day, the commit, the machine and the versions, as one line."""
    command = PATH.sub("", command)
    versions = ", ".join(f"{name} {found}" for name in packages if (found := version_of(name)))
    return (
        f"`{command}` on {datetime.now(UTC):%Y-%m-%d}, commit {commit()}: {machine()}; "
        f"Python {platform.python_version()}{', ' if versions else ''}{versions}."
    )


def machine() -> str:
    """The machine's cores, processor and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, {memory:.0f} GiB"


@cache
def commit() -> str:
    """The commit at the first call, with a note if the tree has changes other than the page's.

    Call it before measuring, since the tree may be at another commit when the page is written.
    """
    git = ["git", "-C", str(FILE.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    own = (FILE.name, FILE.with_suffix(".svg").name)
    dirty = any(not line.endswith(own) for line in changed.stdout.splitlines())
    return head.stdout.strip() + (" with changes" if dirty else "")


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    bars = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, bars, *rows])


def cells_of(text: str) -> list[dict[str, str]]:
    """The lines of the table in `text`, its cells by the names of the columns."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, cells, strict=True)) for cells in rows]


def below(text: str, *headings: str) -> str:
    """What stands in a part below `headings`, one level after the other; '' if it has not all of them."""
    for level, heading in enumerate(headings, 3):
        found = re.split(rf"^{'#' * level} {re.escape(heading)}.*$", text, maxsplit=1, flags=re.MULTILINE)
        if not found[1:]:
            return ""
        text = re.split(rf"^#{{3,{level}}} ", found[1], maxsplit=1, flags=re.MULTILINE)[0]
    return text


def one_line(words: str, most: int = 160) -> str:
    """An error as the text of a table cell, without paths of this machine."""
    return PATH.sub("", " ".join(words.split()))[:most].replace("|", "/")
