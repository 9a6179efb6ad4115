"""A neighbour in a memory cgroup: it takes memory until the kernel has killed some other process there.

`python neighbour.py CGROUP KILLED`, KILLED as it was before the memory was limited: some process may be
killed while this one starts. It imports nothing of ours, so that it starts in milliseconds.
"""

import os
import sys
import time
from pathlib import Path

STEP = 4 * 2**20
"""Bytes that are taken at once."""


def main(group: Path, before: int) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    taken = []
    while killed(group) == before:
        taken.append(b"x" * STEP)
        time.sleep(0.001)


def killed(group: Path) -> int:
    """How many processes of the group the kernel has killed."""
    words = (group / "memory.oom_control").read_text().split()
    return int(words[words.index("oom_kill") + 1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
