"""A database holds each key exactly once: concurrent writers, crashes, full disks."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.servers.databases import FLAT, OUT, TABLE, Place, row, selection, sqlite
from tests.servers.postgres import Postgres
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.errors import TablesUnavailable

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def commit_groups(url: str, name: str, groups: int, begun: Any = None) -> None:
    """Commits groups of the same keys as the other processes do."""
    db = Database(url)
    writer = db.writer(selection(), FLAT)
    for n in range(groups):
        chosen = random.sample(range(60), 20)
        rows = [row(k, output=f"{name} {n}", _position=p) for k in chosen for p in range(1 + (k + n) % 3)]
        writer.commit(rows, [])
        if begun and not n:
            begun.set()
    db.close()


def whole(place: Place) -> bool:
    """Whether each key has the positions 0, 1, ... of one commit."""
    by_key: dict[Any, list[tuple[Any, Any]]] = {}
    for key, position, output in place.sql(f'SELECT id, _position, output FROM "{OUT}"'):
        by_key.setdefault(key, []).append((position, output))
    return all(
        sorted(p for p, _ in rows) == list(range(len(rows))) and len({o for _, o in rows}) == 1
        for rows in by_key.values()
    )


def test_four_writers_of_the_same_keys(place: Place) -> None:
    """None fails, and each key is there once, as one of them wrote it."""
    place.fill(60)
    writers = [PROCESSES.Process(target=commit_groups, args=(place.url, f"w{n}", 40)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len({k for k, _ in place.outputs()}) == 60
    assert whole(place)


def test_a_writer_killed_at_any_moment(place: Place) -> None:
    """Committed groups are complete, others leave nothing, and the next writer resumes."""
    place.fill(60)
    begun = PROCESSES.Event()
    for _ in range(3):
        process = PROCESSES.Process(target=commit_groups, args=(place.url, "k", 10**9, begun))
        process.start()
        assert begun.wait(60)
        begun.clear()
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.join()
        process.close()
        assert whole(place)
    commit_groups(place.url, "n", 3)
    assert whole(place)


def test_a_commit_whose_acknowledgement_was_lost(place: Place) -> None:
    """A repeated commit replaces itself, or the commit of a concurrent writer."""
    db = place.fill()
    for table in (TABLE, replace(FLAT, name="_outputs__flat")):
        extra = {"_position": 0} if table.flatten else {}
        writer = db.writer(selection(), table)
        writer.commit([row(k, output="first", **extra) for k in range(3)], [])
        writer.commit([row(k, output="again", **extra) for k in range(3)], [])
        rival = place.open().writer(selection(), table)
        rival.commit([row(k, output="rival", **extra) for k in range(2, 5)], [])
        found = db.outputs(table.name)
        assert Counter(found["output"].to_pylist()) == {"again": 2, "rival": 3}
        writer.commit([], [])


def test_a_key_that_comes_twice_in_a_commit(place: Place) -> None:
    """If a key comes up twice, the later outcome is kept, with its positions and no others."""
    db = place.fill()
    db.writer(selection(), TABLE).commit([row(1, output="first"), row(2), row(1, output="later")], [])
    assert place.outputs() == [(1, "later"), (2, "o")]
    flat = replace(FLAT, name="_outputs__flat")
    writer = db.writer(selection(), flat)
    twice = [row(1, output="first", _position=p) for p in range(3)]
    twice += [row(1, output="later", _position=p) for p in range(2)]
    writer.commit([*twice, row(2, _position=0), row(3, _position=0), row(3, _position=None)], [(3,)])
    writer.commit([row(4, _position=None), row(4, _position=0), row(4, _position=1)], [])
    assert sorted(place.sql('SELECT id, coalesce(_position, -1), output FROM "_outputs__flat"')) == [
        (1, 0, "later"),
        (1, 1, "later"),
        (2, 0, "o"),
        (3, -1, "o"),
        (4, 0, "o"),
        (4, 1, "o"),
    ]


def test_postgres_restarted(pg: Place, postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost server is `TablesUnavailable`, nothing of the commit is written, and later it is repeated."""
    monkeypatch.setattr("vllm_tasks.datalayer.spool.MOST", 1)
    db = pg.fill(30_000)
    writer = db.writer(selection(), TABLE)
    writer.commit([row(0)], [])
    pages = db.rows(selection(), 10)
    next(pages)
    for end in (postgres.stop, postgres.kill):
        end()
        with pytest.raises(TablesUnavailable):
            writer.commit([row(1)], [])
        with contextlib.closing(pages), pytest.raises(TablesUnavailable):
            list(pages)
        postgres.start()
        assert pg.outputs() == [(0, "o")]
        pages = db.rows(selection(), 10)
        next(pages)
        writer.commit([row(0)], [(0,)])
    pages.close()
    assert writer.commit([row(1)], []) is None
    assert pg.outputs() == [(0, "o"), (1, "o")]


def test_postgres_killed_during_commits(pg: Place, postgres: Postgres) -> None:
    """A commit is complete or absent at any moment, and repeating it succeeds."""
    db = pg.fill(2000)
    writer = db.writer(selection(), TABLE)
    for round_ in range(2):
        rows = [row(k, output=str(round_)) for k in range(2000)]
        killer = threading.Timer(random.uniform(0.0, 0.05), postgres.kill)
        killer.start()
        with contextlib.suppress(TablesUnavailable):
            while True:
                writer.commit(rows, [])
        killer.join()
        postgres.start()
        assert {o for _, o in pg.outputs()} in ({str(round_)}, {str(round_ - 1)}, set())
        writer.commit(rows, [])
        assert pg.outputs() == sorted((k, str(round_)) for k in range(2000))


def test_a_full_disk(tmp_path: Path) -> None:
    """A full disk is `TablesUnavailable`, nothing of the commit is kept, and with space again it succeeds."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    place = sqlite(disk)
    try:
        db = place.fill()
        writer = db.writer(selection(), TABLE)
        writer.commit([row(0)], [])
        (disk / "filler").write_bytes(b"x" * 600_000)
        with pytest.raises(TablesUnavailable, match="full"):
            writer.commit([row(k, output="x" * 100_000) for k in range(1, 10)], [])
        assert place.outputs() == [(0, "o")]
        (disk / "filler").unlink()
        writer.commit([row(k) for k in range(1, 10)], [])
        assert len(place.outputs()) == 10
        db.close()
    finally:
        subprocess.run(["umount", disk], check=True)
