"""The page of results, of which each command writes its own part."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import read, record


def test_a_command_replaces_its_own_part_alone(tmp_path: Path) -> None:
    """Also beside a part that it does not know, which a newer version has written meanwhile."""
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\n## Of a newer version\n\nkept\n\n## Gate\n\nold\n")
    record("Gate", "make bench-GATE", "new", file=page)
    parts = read(page)
    assert parts["Of a newer version"] == "kept"
    assert parts["Gate"].endswith("new")
    assert "old" not in parts["Gate"]
