"""Commits to one lake, measured: the seconds of their parts, and how many a second several writers make.

Rows are scripted and there is no engine. A row has the columns of every outputs table and an answer of about
200 tokens, in random words, so that Parquet cannot compress it to nothing.
"""

from __future__ import annotations

import json
import os
import random
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.transaction import AddAction, RemoveAction

from benchmarks.children import Child
from benchmarks.p7 import write_rows
from vllm_tasks.datalayer.lake import lake as lakes
from vllm_tasks.datalayer.lake.delta_writer import DeltaWriter
from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn, OutputTable, Row, Selection

GROUPS = 512, 4096, 8192
"""Rows of a commit: the default of VLLM_TASKS_COMMIT_ROWS, and larger ones."""
WORDS = 130
"""Words of an answer: about 200 tokens."""
FILES = 0, 2000, 8000
"""Files of the table; 100 M such rows are about 8,000 of 4 MB."""
KNOWN = 0, 1_000_000, 10_000_000
"""Keys that others have written since the writer began."""
BEHIND = 1, 8, 24
"""Commits of others since the writer's last one."""
REPEATS = 5
SECONDS = 6.0
"""How long several writers commit at once."""
OUTPUTS = "_outputs__m"
SELECTION = Selection("rows", ("id",), ("text",), OUTPUTS, "f")
TABLE = OutputTable(OUTPUTS, (OutputColumn("output", "str"),))
OTHERS = 1 << 40
"""The first key of the rows that others have written."""


@dataclass
class Sample:
    """A commit, and what its time depends on: the rows of the group, the files of the table, commits of
    others since the last one, and the keys that are known."""

    rows: int
    files: int = 0
    behind: int = 0
    known: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By part, over all attempts."""
    attempts: int = 0

    @property
    def total(self) -> float:
        """Seconds of the commit."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Contended:
    """What some writers did at once within some seconds, in all."""

    writers: int
    group: int
    seconds: float
    commits: int
    attempts: int
    slowest: float
    """Seconds of the slowest commit of the writer in the middle."""
    cpu: float
    """CPU seconds."""
    wasted: float
    """Bytes of files that no commit has named, because it failed, divided by those of the table."""

    @property
    def rate(self) -> float:
        """Commits a second."""
        return self.commits / self.seconds


class Timed(DeltaWriter):
    """A writer that times the parts of its commits."""

    parts: dict[str, float]
    attempts: int

    def start(self) -> None:
        """Begin a new sample."""
        self.parts, self.attempts = {}, 0

    def _latest(self) -> DeltaTable:
        self.attempts += 1
        delta: DeltaTable = self._timed("log", super()._latest)
        return delta

    def _taken(self, new: pa.Table) -> pa.Table:
        return self._timed("join", lambda: super(Timed, self)._taken(new))

    def _write(self, delta: DeltaTable, new: pa.Table, old: pa.Table) -> None:
        self._timed("write", lambda: super(Timed, self)._write(delta, new, old))

    def _timed(self, part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started


def opened(folder: str) -> tuple[lakes.Lake, Timed]:
    """A lake and a writer to its outputs."""
    lakes.DeltaWriter = Timed  # type: ignore[attr-defined]  # the writer that lakes make
    lake = lakes.Lake(folder)
    writer = lake.writer(SELECTION, TABLE)
    assert isinstance(writer, Timed)
    writer.start()
    return lake, writer


def answers(seed: int) -> list[str]:
    """As many different answers as the largest group has rows."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    return [" ".join(rng.choices(words, k=WORDS)) for _ in range(max(GROUPS))]


def rows_of(texts: Sequence[str], first: int, count: int) -> list[Row]:
    """`count` rows with the keys from `first` on."""
    own = dict.fromkeys(OWN_COLUMNS) | {"_fingerprint": "f" * 64, "_created_at": datetime.now(UTC)}
    return [{"id": first + i, "output": texts[i], **own} for i in range(count)]


def commit(writer: Timed, texts: Sequence[str], first: int, count: int) -> tuple[dict[str, float], int]:
    """Make and commit `count` rows with the keys from `first` on; returns the seconds of the parts, and the
    attempts."""
    writer.start()
    started = time.perf_counter()
    writer.commit(rows_of(texts, first, count), ())
    total = time.perf_counter() - started
    return {**writer.parts, "rest": total - sum(writer.parts.values())}, writer.attempts


# ---------------------------------------------------------------------- one writer


def parts() -> list[Sample]:
    """Samples of commits of one writer at a time, over all that their time depends on."""
    with Child(_parts) as child:
        found: list[Sample] = child.receive()
        return found


def _parts(pipe: Connection) -> None:
    pipe.send("ready")
    texts = answers(0)
    found = [sample for files in FILES for sample in _with_files(texts, files)]
    found += [sample for known in KNOWN[1:] for sample in _with_known(texts, known)]
    pipe.send(found)


def _with_files(texts: Sequence[str], files: int) -> Iterator[Sample]:
    """Commits into a table of so many files, alone and behind others."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        write_rows(Path(folder), 1)
        (_, other), first = _opened(folder, closing), 1
        commit(other, texts, OTHERS, GROUPS[0])
        _copy_file(f"{folder}/{OUTPUTS}", files)
        (_, writer), (_, other) = _opened(folder, closing), _opened(folder, closing)
        commit(writer, texts, 0, 1)  # warms up
        for group in GROUPS:
            for _ in range(REPEATS):
                done = commit(writer, texts, first, group)
                first += group
                yield Sample(group, files, 0, 0, *done)
        for behind in BEHIND:
            for _ in range(REPEATS):
                for _ in range(behind):
                    commit(other, texts, first, GROUPS[0])
                    first += GROUPS[0]
                done = commit(writer, texts, first, GROUPS[0])
                first += GROUPS[0]
                yield Sample(GROUPS[0], files, behind, 0, *done)


def _with_known(texts: Sequence[str], known: int) -> Iterator[Sample]:
    """Commits of a writer that knows so many keys, which another one has written meanwhile."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        write_rows(Path(folder), 1)
        _, writer = _opened(folder, closing)
        commit(writer, texts, 0, GROUPS[0])
        write_keys(f"{folder}/{OUTPUTS}", known)
        commit(writer, texts, GROUPS[0], GROUPS[0])  # reads them
        for i in range(2, 2 + REPEATS):
            done = commit(writer, texts, i * GROUPS[0], GROUPS[0])
            yield Sample(GROUPS[0], 1, 0, known, *done)


def _opened(folder: str, closing: ExitStack) -> tuple[lakes.Lake, Timed]:
    lake, writer = opened(folder)
    closing.callback(lake.close)
    return lake, writer


def write_keys(table: str, count: int, first: int = OTHERS, part: int = 1_000_000) -> None:
    """Append rows with `count` keys from `first` on, in files of `part` rows, and nothing else in them."""
    schema = pa.schema(DeltaTable(table).schema().to_arrow())
    for start in range(first, first + count, part):
        rows = min(part, first + count - start)
        columns = [
            pa.array(range(start, start + rows), f.type) if f.name == "id"
            else pa.repeat(pa.scalar("f" * 64, f.type), rows) if f.name == "_fingerprint"
            else pa.nulls(rows, f.type)
            for f in schema
        ]  # fmt: skip
        write_deltalake(table, pa.table(columns, schema=schema), mode="append")


def _copy_file(table: str, copies: int) -> None:
    """Add copies of the table's one file to it, in one commit; their keys are never read here."""
    delta = DeltaTable(table)
    (there,) = pa.table(delta.get_add_actions()).to_pylist()
    actions: list[AddAction | RemoveAction] = []
    for i in range(copies):
        name = f"copy-{i}.parquet"
        os.link(f"{table}/{there['path']}", f"{table}/{name}")
        stats = f'{{"numRecords": {there["num_records"]}}}'
        actions.append(AddAction(name, there["size_bytes"], {}, 0, True, stats))
    if actions:
        delta.create_write_transaction(actions, "append", delta.schema())


# ---------------------------------------------------------------------- one writer, many commits


def growing(group: int, commits: int) -> list[float]:
    """Seconds of the commits of one writer into a table that begins empty, its compactions included."""
    with Child(_growing, group, commits) as child:
        found: list[float] = child.receive()
        return found


def _growing(pipe: Connection, group: int, commits: int) -> None:
    pipe.send("ready")
    texts, found = answers(0), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), 1)
        lake, writer = opened(folder)
        for i in range(commits):
            rows = rows_of(texts, i * group, group)
            started = time.perf_counter()
            writer.commit(rows, ())
            found.append(time.perf_counter() - started)
        lake.close()
    pipe.send(found)


# ---------------------------------------------------------------------- several writers


def contended(counts: Sequence[int], groups: Sequence[int]) -> Iterator[Contended]:
    """What the numbers of writers do at once, for each size of groups; each case in a lake of its own."""
    with ExitStack() as running:
        writers = [running.enter_context(Child(_contends, i)) for i in range(max(counts))]
        for group in groups:
            for count in counts:
                yield _at_once(writers[:count], group, SECONDS)


def _at_once(writers: Sequence[Child], group: int, seconds: float) -> Contended:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), 1)
        for writer in writers:
            writer.request((folder, group, seconds))
        for writer in writers:
            writer.send("go")
        done: list[tuple[list[float], int, float]] = [writer.receive() for writer in writers]
        wasted = wasted_of(Path(folder, OUTPUTS))
    slowest = sorted(max(times) for times, _, _ in done)
    return Contended(
        writers=len(writers),
        group=group,
        seconds=seconds,
        commits=sum(len(times) for times, _, _ in done),
        attempts=sum(attempts for _, attempts, _ in done),
        slowest=slowest[len(slowest) // 2],
        cpu=sum(cpu for _, _, cpu in done),
        wasted=wasted,
    )


def wasted_of(table: Path) -> float:
    """The bytes of files that no entry of the log names, divided by the bytes of the table's files."""
    held = sum(pa.table(DeltaTable(table).get_add_actions())["size_bytes"].to_pylist())
    entries = (line for file in table.glob("_delta_log/*.json") for line in file.read_text().splitlines())
    named = {entry["add"]["path"] for entry in map(json.loads, entries) if "add" in entry}
    lost = (file.stat().st_size for file in table.glob("*.parquet") if file.name not in named)
    return float(sum(lost) / held)


def _contends(pipe: Connection, number: int) -> None:
    """A writer: for each order, send the seconds of its commits, its attempts and its CPU seconds."""
    texts = answers(number)
    pipe.send("ready")
    while True:
        folder, group, seconds = pipe.recv()
        lake, writer = opened(folder)
        pipe.send("ready")
        pipe.recv()
        times, attempts, begun, cpu = list[float](), 0, time.monotonic(), time.process_time()
        while time.monotonic() - begun < seconds:
            started = time.perf_counter()
            attempts += commit(writer, texts, (number << 32) + len(times) * group, group)[1]
            times.append(time.perf_counter() - started)
        pipe.send((times, attempts, time.process_time() - cpu))
        lake.close()
