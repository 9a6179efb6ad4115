"""Exactly once, whatever dies: kills at random moments, concurrent writers, lost databases, a full disk."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Jobs
from tests.places import Place
from tests.servers.scripted_server import Asked, ScriptedServer, answer_to
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.tables.source_rows import BATCH_ROWS

ROWS = 1500
GROUP = 20
IN_FLIGHT = 16


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Answers after a few milliseconds, at random."""

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(random.uniform(0.001, 0.03))

    with ScriptedServer(script) as server:
        yield server


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Jobs(tmp_path_factory.mktemp("jobs") / "log") as jobs:
        yield jobs


def model_of(server: ScriptedServer, place: Place) -> dict[str, Any]:
    """Fields of the model, for a process of its own."""
    return {
        "identifier": "m",
        "api_url": server.url,
        "db": {"url": place.url},
        "max_in_flight": IN_FLIGHT,
        "retries": 5,
    }


def start(jobs: Jobs, server: ScriptedServer, place: Place) -> int:
    return jobs.start(model_of(server, place), "text", "rows", max_chunk_size=GROUP)


def finish(jobs: Jobs, server: ScriptedServer, place: Place) -> None:
    jobs.run(model_of(server, place), "text", "rows", max_chunk_size=GROUP)


def committed(place: Place) -> set[int]:
    """The committed keys; fails the test if one is there twice or wrong."""
    try:
        answers = place.answers()
    except InvalidCall:  # not made yet
        return set()
    assert all(output == answer_to(f"t{key}") for key, output in answers.items())
    return set(answers)


def asked_since(server: ScriptedServer, first: int) -> Counter[int]:
    return Counter(int(asked.prompt[1:]) for asked in server.posts[first:])


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.long)])
def test_killed_at_any_moment_nothing_committed_is_lost_or_asked_again(
    place: Place, server: ScriptedServer, jobs: Jobs, kills: int
) -> None:
    """After each SIGKILL every committed row is complete and never sent again; only rows in flight or not
    yet committed at a kill are sent twice. In the end each key is there once, as undisturbed.
    """
    place.fill_texts(*(f"t{i}" for i in range(ROWS)))
    done: set[int] = set()
    may_be_asked_twice: set[int] = set()
    for _ in range(kills):
        first = len(server.posts)
        job = start(jobs, server, place)
        enough = first + random.randint(0, 2 * ROWS // kills)
        server.wait_until(lambda: len(server.posts) >= enough or len(committed(place)) == ROWS)  # noqa: B023
        time.sleep(random.uniform(0, 0.1))
        jobs.kill(job)
        time.sleep(0.05)  # what was sent arrives
        asked = asked_since(server, first)
        assert not asked.keys() & done, "a committed row was asked again"
        assert max(asked.values(), default=1) == 1
        now = committed(place)
        assert done <= now, "a committed row is gone"
        uncommitted = asked.keys() - now
        assert len(uncommitted) <= IN_FLIGHT + 2 * GROUP + BATCH_ROWS  # no more is read before a commit
        may_be_asked_twice |= uncommitted
        done = now
    first = len(server.posts)
    finish(jobs, server, place)
    assert not asked_since(server, first).keys() & done
    assert committed(place) == set(range(ROWS))
    times = asked_since(server, 0)
    assert {key for key, n in times.items() if n > 1} <= may_be_asked_twice
    finish(jobs, server, place)
    assert asked_since(server, 0) == times, "nothing was left to ask"


def test_four_writers_at_once_leave_each_key_once(place: Place, server: ScriptedServer, jobs: Jobs) -> None:
    """Four processes over the same table at the same time all succeed, and each key is there once."""
    rows = 300
    place.fill_texts(*(f"t{i}" for i in range(rows)))
    running = [start(jobs, server, place) for _ in range(4)]
    assert [jobs.wait(job) for job in running] == [0, 0, 0, 0], jobs.log.read_text()[-5000:]
    assert committed(place) == set(range(rows))


def test_a_server_that_is_killed_again_and_again(place: Place, server: ScriptedServer, jobs: Jobs) -> None:
    """A server that breaks every connection and comes back loses no row and doubles none."""
    rows = 400
    place.fill_texts(*(f"t{i}" for i in range(rows)))
    job = start(jobs, server, place)
    for goal in (50, 150, 250):
        server.wait_until(lambda: len(server.posts) >= goal)  # noqa: B023
        server.stop()
        time.sleep(0.3)
        server.start()
    assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
    assert committed(place) == set(range(rows))


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_commits_what_is_finished(
    place: Place, server: ScriptedServer, jobs: Jobs, way: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM commit all completed rows and drop the rest."""
    answered = 30
    place.fill_texts(*(f"t{i}" for i in range(200)))

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > answered:
            await asyncio.sleep(3600)

    server.script = script
    job = jobs.start(model_of(server, place), "text", "rows")  # groups of 512: none is closed by its size
    server.wait_until(lambda: len(server.posts) == answered + IN_FLIGHT)
    time.sleep(1)  # the last answers arrive
    os.kill(job, way)
    assert jobs.wait(job) != 0
    assert len(committed(place)) == answered
    server.wait_until(lambda: server.open == 0)
    assert "run it again to resume" in jobs.log.read_text()


def test_a_postgresql_that_is_restarted(server: ScriptedServer, postgres: Any, jobs: Jobs) -> None:
    """PostgreSQL is killed and restarted twice during a run, which waits and resumes."""
    rows = 600
    place = Place(postgres.new_database())
    place.fill_texts(*(f"t{i}" for i in range(rows)))
    job = start(jobs, server, place)
    for goal, end in ((100, postgres.kill), (300, postgres.stop)):
        server.wait_until(lambda: len(server.posts) >= goal)  # noqa: B023
        end()
        time.sleep(0.5)
        postgres.start()
    assert jobs.wait(job) == 0, jobs.log.read_text()[-5000:]
    assert committed(place) == set(range(rows))
    assert max(asked_since(server, 0).values()) == 1, "a lost database is no reason to ask again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["lake", "sqlite"])
def test_a_full_disk_fails_the_run_and_loses_nothing(
    kind: str, server: ScriptedServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit without space fails, committed rows stay, and with space again the rest follows."""
    monkeypatch.setattr("vllm_tasks.tables.source_rows.RETRY_DELAYS", (0,))
    monkeypatch.setattr("vllm_tasks.tables.log.RETRY_DELAYS", (0,))
    place = Place(str(small_disk / "lake") if kind == "lake" else f"sqlite:///{small_disk}/tables.db")
    place.fill_texts(*(f"t{i}" for i in range(ROWS)))
    model = VllmAPI(**model_of(server, place))
    first = model.predict_in_db("text", "rows", limit=100)
    assert first.succeeded == 100
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(os.urandom(free - 16_384))
    with pytest.raises(TablesUnavailable):
        model.predict_in_db("text", "rows", max_chunk_size=GROUP)
    done = committed(place)
    assert len(done) >= 100
    ballast.unlink()
    before = len(server.posts)
    model.predict_in_db("text", "rows", max_chunk_size=GROUP)
    assert committed(place) == set(range(ROWS))
    assert not asked_since(server, before).keys() & done
    model.close()


def test_an_interrupted_thread_leaves_no_request(place: Place, server: ScriptedServer) -> None:
    """After a failed call, none of its rows is in flight and none of its threads is left."""
    place.fill_texts(*(f"t{i}" for i in range(100)))
    with VllmAPI(**{**model_of(server, place), "model": "m"}) as model:
        model.predict_in_db("text", "rows", limit=5)
        names = {thread.name for thread in threading.enumerate()}
        assert not {"vllm-tasks-reader", "vllm-tasks-count"} & names
    assert server.open == 0
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize("place", ["lake", "postgres"], indirect=True)
def test_a_killed_run_of_a_source_elsewhere_goes_on(
    place: Place, server: ScriptedServer, tmp_path: Path
) -> None:
    """In a lake each row is there once, no committed row is sent again, and TMPDIR is empty."""
    rows, temporary, left = 600, tmp_path / "tmp", set[Path]()
    temporary.mkdir()
    place.fill_texts(*(f"t{i}" for i in range(rows)))
    home = Place(str(tmp_path / "home"))
    Path(home.url).mkdir()
    call = {"source": place.url, "max_chunk_size": GROUP}
    with Jobs(tmp_path / "log", {"TMPDIR": str(temporary)}) as jobs:
        for _ in range(5):
            first, done = len(server.posts), committed(home)
            job = jobs.start(model_of(server, home), "text", "rows", **call)
            enough = first + random.randint(1, rows // 5)
            server.wait_until(lambda: len(server.posts) >= enough or len(committed(home)) == rows)  # noqa: B023
            time.sleep(random.uniform(0, 0.1))
            jobs.kill(job)
            left |= {*temporary.iterdir()}
            time.sleep(0.05)  # what was sent arrives
            assert not asked_since(server, first).keys() & done, "a committed row was asked again"
            assert done <= committed(home), "a committed row is gone"
        jobs.run(model_of(server, home), "text", "rows", **call)
        assert committed(home) == set(range(rows))
        assert left, "no kill left anything to remove"
        assert not list(temporary.iterdir()), "a spill folder or a spool is left"
