"""The long form: python -m tests.faults [--seed N] [--kills 100] [--only NAME]

Prints each run as it ends; writes the part "Faults" of `benchmarks/RESULTS.md`, but for `--only`.
Exits with 1 when a run did not keep the promise, after all runs. Runs that need what this machine lacks (a
C compiler, MariaDB, file systems to mount, memory cgroups) are left out, and the page says so.

`--litellm PROGRAM` adds LiteLLM's proxy, installed in an environment of its own (`pip install
'litellm[proxy]'`), `--prefect PYTHON` the Prefect server of another environment.
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
from tests.faults.ground import Ground, Lacking, made
from tests.faults.page import PACKAGES, Pass
from tests.faults.schedule import SHARES, Others, Run, runs

NAMES = (
    "flow", "work", "sources", "postgresql", "gateway", "memory", "hangs", "engine", "server", "ray",
    "network", "storms", "disks", "clock", "prefect",
)  # fmt: skip


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    options = arguments()
    print(f"seed {options.seed}, commit {commit()}", flush=True)
    command = f"python -m tests.faults {' '.join(sys.argv[1:])}"
    folder = tempfile.TemporaryDirectory(prefix="vllm-tasks-faults-")
    with folder as path, made(Path(path), options.seed) as ground:
        planned = list(runs(options.kills, Others(options.litellm, options.prefect)))
        done = Pass(len(planned))
        for name, run in planned:
            if options.only in (None, name):
                told(name, run, ground, done)
            if options.only is None:  # after each run: an interrupted pass has a page, too
                record("Faults", command, done.page(), PACKAGES)
    return 1 if done.broken else 0


def told(name: str, run: Run, ground: Ground, done: Pass) -> None:
    """Do a run and print its result."""
    began = time.monotonic()
    try:
        done.found.append(run(ground))
        print(f"{name}: {done.found[-1]} in {time.monotonic() - began:.0f} s", flush=True)
    except Lacking as error:
        done.left_out.append(f"{name}: {error}")
        print(f"{name} left out: {error}", flush=True)
    except Exception as error:  # noqa: BLE001 - a breach, or a run that stuck: both are told, and others follow
        done.broken.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{name} BROKEN: {error!r}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="What dies on the way.")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the schedule")
    parser.add_argument("--kills", type=int, default=100, help=f"in all, shared out: {SHARES}")
    parser.add_argument("--litellm", default="", help="LiteLLM's program, whose proxy is killed, too")
    parser.add_argument("--prefect", default="", help="the Python of an environment with another Prefect")
    parser.add_argument("--only", choices=NAMES, help="one kind of fault")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
