"""The code blocks of the documentation run as they are printed, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tests.servers.scripted_server import ScriptedServer

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[int, str, str]]:
    """(line, Python, what it prints) of each block; those that follow each other share their names."""
    text = (DOCS / page).read_text()
    found: list[tuple[int, str, str]] = []
    for match in BLOCK.finditer(text):
        if match["language"] == "python":
            found.append((text.count("\n", 0, match.start()) + 2, match["text"], ""))
        elif match["language"] == "text":
            line, code, _ = found.pop()
            found.append((line, code, match["text"]))
    return found


@pytest.mark.parametrize("page", ["tables.md"])
def test_blocks_print_what_the_page_says(
    page: str, tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder, from the first to the last, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_TASKS_API_URL", server.url)
    names: dict[str, object] = {"__name__": "__main__"}
    found = blocks(page)
    assert found, f"{page} has no code"
    for line, code, expected in found:
        printed = io.StringIO()
        # Blank lines before it, so that an error names the line of the page.
        compiled = compile("\n" * (line - 1) + code, str(DOCS / page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(compiled, names)
        assert printed.getvalue() == expected, f"{page}, line {line}"
