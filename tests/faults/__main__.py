"""The long form: python -m tests.faults [--seed N] [--kills 50] [--only NAME]

Prints each run as it ends; writes the part "Faults" of `benchmarks/RESULTS.md`, but for `--only`.
Exits with 1 when a run did not keep the promise, after all runs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import conftest  # noqa: F401 - its environment, before Prefect reads it

# ruff: isort: split
from benchmarks.results import commit, record
from tests.faults.ground import Ground, made
from tests.faults.ledger import Figures
from tests.faults.page import PACKAGES, page
from tests.faults.schedule import SHARES, Run, runs

NAMES = ("flow", "postgresql", "engine", "server", "ray", "network", "storms", "disks", "clock", "prefect")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    options = arguments()
    print(f"seed {options.seed}, commit {commit()}", flush=True)
    command = f"python -m tests.faults --seed {options.seed} --kills {options.kills}"
    found: list[Figures] = []
    broken: list[str] = []
    folder = tempfile.TemporaryDirectory(prefix="vllm-tasks-faults-")
    with folder as path, made(Path(path), options.seed) as ground:
        planned = list(runs(options.kills))
        for name, run in planned:
            if options.only in (None, name):
                told(name, run, ground, found, broken)
            if options.only is None:  # after each run: an interrupted pass has a page, too
                record("Faults", command, page(found, broken, len(planned)), PACKAGES)
    return 1 if broken else 0


def told(name: str, run: Run, ground: Ground, found: list[Figures], broken: list[str]) -> None:
    """Do a run and print its result."""
    began = time.monotonic()
    try:
        found.append(run(ground))
        print(f"{name}: {found[-1]} in {time.monotonic() - began:.0f} s", flush=True)
    except Exception as error:  # noqa: BLE001 - a breach, or a run that stuck: both are told, and others follow
        broken.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name} BROKEN: {error!r}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="What dies on the way.")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the schedule")
    parser.add_argument("--kills", type=int, default=50, help=f"in all, shared out: {SHARES}")
    parser.add_argument("--only", choices=NAMES, help="one kind of fault")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
