"""Processes that write the same keys of a lake at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.datalayer.lake.rows import OUT
from vllm_tasks.datalayer.lake.lake import Lake

RIVAL = """
import random, sys
from tests.datalayer.lake.rows import FLAT, OUT, row, selection
from vllm_tasks.datalayer.lake.lake import Lake
folder, name, seed = sys.argv[1:]
lake = Lake(folder)
chosen = selection(fingerprint=name, refresh="missing")
writer = lake.writer(chosen, FLAT)
print("ready", flush=True)
sys.stdin.readline()
random.seed(int(seed))
rows = [r for part in lake.rows(chosen, 7) for r in part]
random.shuffle(rows)
for start in range(0, len(rows), 3):
    group = rows[start:start + 3]
    writer.commit(
        [row(r.key[0], name, _position=p, _fingerprint=name) for r in group for p in range(2)],
        [r.key for r in group if r.redo],
    )
    print(*(r.key[0] for r in group), flush=True)
writer.close()
lake.close()
"""


def start_rival(folder: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RIVAL, folder, name, "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def exactly_once(lake: Lake, wanted: set[int]) -> None:
    """Each key has the two positions of one and the same writer."""
    found: dict[int, list[Any]] = {}
    for r in lake.outputs(OUT).to_pylist():
        found.setdefault(r["id"], []).append((r["output"], r["_position"]))
    assert set(found) == wanted
    for positions in found.values():
        assert sorted(positions) == [(positions[0][0], 0), (positions[0][0], 1)]


def go(rivals: list[subprocess.Popen[str]]) -> None:
    for rival in rivals:
        assert rival.stdout
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin
        rival.stdin.write("go\n")
        rival.stdin.flush()


def run_rivals(rivals: list[subprocess.Popen[str]]) -> None:
    go(rivals)
    for rival in rivals:
        rival.communicate(timeout=60)
        assert rival.returncode == 0
