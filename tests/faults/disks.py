"""Disks that are full or read-only for a while."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.eventually import eventually
from tests.faults.ground import Ground, Lacking
from tests.faults.kills import slowly, somewhere
from tests.faults.ledger import Figures
from tests.faults.work import Work, briefly
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer

LEFT = 16_384
"""Bytes that a full disk has left: something is begun, and cannot be ended."""
GRACE_PERIOD = 2.5
"""Seconds without room, of the 51 that commits are tried again for."""
WIDE_ROWS = 600
WIDTH = 60_000
"""Characters of a row's text: 36 MB in all, of which reading keeps 16 MiB in memory."""
SELECT_MEMORY = "60MB"
SORTED = """\
SELECT id, min(text) AS text FROM (
    SELECT id, text, row_number() OVER (ORDER BY md5(text || n)) AS r FROM rows, range(1000) t(n)
) WHERE r > 0 GROUP BY id"""
"""Returns the rows as they are, after it has sorted 600,000, which do not fit into this memory."""


@contextmanager
def disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A file system of its own; raises `Lacking` where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if (mounted := subprocess.run(mount, capture_output=True, check=False)).returncode:
        raise Lacking(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # though a job should still be there


def fill(folder: Path) -> None:
    stat = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - LEFT)))


def empty(folder: Path) -> None:
    (folder / "ballast").unlink()


def close(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def open_again(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def fault(
    ground: Ground, kind: str, name: str, begin: Callable[[Path], None], end: Callable[[Path], None]
) -> Figures:
    """The disk fails during a run, which resumes with the disk, or stops and resumes by the same call."""
    chance = ground.chance(f"{name} {kind}")
    with ScriptedServer(slowly(chance)) as server, disk(ground.folder / f"{name}-{kind}") as folder:
        place = Place(str(folder / "lake") if kind == "lake" else f"sqlite:///{folder}/tables.db")
        run = ground.run_of(f"disk: {name}", place, server, rows=600)
        job = run.start(ground.jobs)
        moment = somewhere(chance, run, 300)
        begin(folder)
        time.sleep(GRACE_PERIOD)
        end(folder)
        run.go_on(ground.jobs, job, moment)
        run.undisturbed(ground.jobs)
        return run.ledger.check()


def full(ground: Ground, kind: str) -> Figures:
    return fault(ground, kind, "full", fill, empty)


def read_only(ground: Ground, kind: str) -> Figures:
    """A lake's disk becomes read-only during the run; SQLite's open file prevents that, so before a call."""
    if kind == "lake":
        return fault(ground, kind, "read-only", close, open_again)
    chance = ground.chance(f"read-only {kind}")
    with ScriptedServer(slowly(chance)) as server, disk(ground.folder / f"read-only-{kind}") as folder:
        run = ground.run_of("disk: read-only", Place(f"sqlite:///{folder}/tables.db"), server, rows=600)
        job = run.start(ground.jobs)
        moment = somewhere(chance, run, 300)
        ground.jobs.kill(job)
        close(folder)
        run.ledger.death(f"killed {moment}")
        assert ground.jobs.wait(run.start(ground.jobs)) != 0
        open_again(folder)
        run.ledger.death("the next call stopped")
        run.finish(ground.jobs)
        run.undisturbed(ground.jobs)
        return run.ledger.check()


def wide(key: int) -> str:
    """A text so wide that the rows of a table do not fit into the memory that reading takes."""
    return f"t{key} {random.Random(key).randbytes(WIDTH // 2).hex()}"


def without_room(ground: Ground, kind: str) -> Figures:
    """The temporary folder is full when rows are read, which waits, or stops and resumes by the same call.

    A lake's SELECT is sorted there, and PostgreSQL's rows are kept there until they are processed. DuckDB
    takes the room that it finds at first for all that it may ever have, so it has to be opened anew.
    """
    name = "disk: temporary folder full"
    chance = ground.chance(f"{name} {kind}")
    is_lake = kind == "lake"
    work = Work(table=("text", SORTED)) if is_lake else Work(deed=briefly)
    text = "t{}".format if is_lake else wide
    script = slowly(chance, work.deed)
    with ScriptedServer(script) as server, disk(ground.folder / f"temporary-{kind}", "256m") as folder:
        jobs = ground.jobs_in({"TMPDIR": str(folder), "VLLM_TASKS_SELECT_MEMORY": SELECT_MEMORY})
        run = ground.run_of(name, ground.place(kind), server, WIDE_ROWS, work, text)
        fill(folder)
        job = run.start(jobs)
        assert eventually(lambda: re.search("source was lost|max_temp_directory_size", jobs.log.read_text()))
        moment = f"full at {len(server.posts)} requests"
        time.sleep(chance.uniform(0, GRACE_PERIOD))
        empty(folder)
        run.go_on(jobs, job, moment)
        run.undisturbed(jobs, script)
        return run.ledger.check()
