"""Shards that commit into one lake, as a discrete-event simulation with measured costs.

Each shard has an engine that completes rows at a constant rate, the package's own `CommitPolicy`, and the
writer's own way to commit: it reads the log and the keys of others' rows, looks for its own keys among them,
and writes, which fails if another one has committed since it has read the log. Shards are on machines of
their own (`cores=None`), or share some cores, to compare the simulation with what was measured.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from benchmarks.scale.commits import Sample
from vllm_tasks.datalayer.lake.delta_writer import ATTEMPTS, COMPACT_EVERY, FILE_BYTES, SMALL_FILES
from vllm_tasks.tables.commit_policy import CommitPolicy
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.source_rows import BATCH_ROWS

PARTS = "log", "join", "write", "rest"
POLL = 0.2
"""Seconds between two looks of a run at its group."""
ROW_BYTES = 300
"""Bytes of a row in a Parquet file."""


@dataclass(frozen=True)
class Work:
    """Seconds of work of a process, which take longer if processes share cores."""

    seconds: float


Process = Generator[float | Work, None, None]
"""Yields seconds to wait, or work."""


class Machine:
    """Runs processes in simulated time. Work shares `cores` evenly; None is a machine for each process."""

    def __init__(self, cores: float | None = None) -> None:
        self.now = 0.0
        self._cores = math.inf if cores is None else cores
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, Process]] = []
        self._working: list[tuple[float, int, Process]] = []
        self._served = 0.0
        """The seconds of work that each process at work has had, if it was there from the beginning."""

    def start(self, process: Process) -> None:
        """Start a process now."""
        self._resume(process)

    def run(self, until: float = math.inf) -> None:
        """Run until all processes have ended, or until that time."""
        while self._waiting or self._working:
            slower = max(1.0, len(self._working) / self._cores)
            wakes = self._waiting[0][0] if self._waiting else math.inf
            ends = self.now + (self._working[0][0] - self._served) * slower if self._working else math.inf
            then = min(wakes, ends)
            if then > until:
                return
            self._served += (then - self.now) / slower
            self.now = then
            _, _, process = heapq.heappop(self._waiting if wakes <= ends else self._working)
            self._resume(process)

    def _resume(self, process: Process) -> None:
        asked = next(process, None)
        if isinstance(asked, Work):
            heapq.heappush(self._working, (self._served + asked.seconds, next(self._order), process))
        elif asked is not None:
            heapq.heappush(self._waiting, (self.now + asked, next(self._order), process))


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of an attempt to commit, linear in what `Sample` names."""

    of: Mapping[str, tuple[float, ...]]

    @classmethod
    def fitted(cls, samples: Iterable[Sample]) -> Costs:
        """The non-negative least squares of the relative errors (Lawson and Hanson 1974)."""
        listed = list(samples)
        what = np.array([_features(s.rows, s.files, s.behind, s.known) for s in listed], dtype=float)
        fitted = {}
        for part in PARTS:
            seconds = np.array([s.seconds.get(part, 0.0) for s in listed])
            weights = 1 / np.maximum(seconds, 1e-4)
            fitted[part] = tuple(nnls(what * weights[:, None], seconds * weights)[0].tolist())
        return cls(fitted)

    def seconds(self, part: str, rows: int, files: float, behind: float, known: float) -> float:
        """The seconds of a part."""
        return sum(
            c * x for c, x in zip(self.of[part], _features(rows, files, behind, known), strict=True)
        )


def _features(rows: float, files: float, behind: float, known: float) -> tuple[float, ...]:
    return 1.0, rows, files, float(behind > 0), behind, known


@dataclass
class Lake:
    """The one lake: its version, its files, and what its writers have done in all."""

    version: int = 0
    small: float = 0.0
    large: float = 0.0
    rows: int = 0
    commits: int = 0
    attempts: int = 0
    failed: int = 0
    """Commits that have lost `ATTEMPTS` times, and are attempted again later."""
    slowest: float = 0.0
    added: int = 0
    """Files that were ever added: those that a writer has not read yet are new to it."""

    @property
    def files(self) -> float:
        """Files of the table."""
        return self.small + self.large


@dataclass(frozen=True)
class Setting:
    """What a simulated run is: shards with engines of `rate` rows/s that share `rows` rows."""

    shards: int
    rows: int
    rate: float
    commit_rows: int = 512
    commit_seconds: float = 30.0
    find: float = 0.0
    """Seconds until a shard has found its first row."""
    window: int = 256
    """Rows in an engine's window."""
    known: float = 1.0
    """The fraction of others' keys that a writer remembers."""
    cores: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Ran:
    """The outcome of a simulated run."""

    setting: Setting
    seconds: float
    commits: int
    attempts: int
    failed: int
    slowest: float

    @property
    def rate(self) -> float:
        """Rows a second of all shards."""
        return self.setting.rows / self.seconds

    @property
    def efficiency(self) -> float:
        """The rate, divided by what the engines could do."""
        return self.rate / (self.setting.shards * self.setting.rate)


@dataclass
class Shard:
    """A shard's engine and its group: rows that are finished and not committed."""

    setting: Setting
    policy: CommitPolicy
    left: int
    """Rows that the engine has not completed at `since`."""
    bound: int
    finished: float = 0.0
    since: float = 0.0
    seen: int = 0
    known: float = 0.0
    commits: int = 0
    fresh: bool = True
    """Whether the writer holds the table, and reads only what is new in its log."""

    def at(self, now: float) -> float:
        """The rows that are finished and not committed; the engine waits when they reach the bound."""
        done = min(self.setting.rate * (now - self.since), self.left, max(0.0, self.bound - self.finished))
        return self.finished + done

    def advance(self, now: float) -> None:
        """Count what the engine has completed until now."""
        there = self.at(now)
        self.left -= round(there - self.finished)
        self.finished, self.since = there, now


def ran(setting: Setting, costs: Costs) -> Ran:
    """Simulate a run until its last commit."""
    machine, lake, rng = Machine(setting.cores), Lake(), random.Random(setting.seed)
    policy = CommitPolicy.of(None, setting.commit_rows, setting.commit_seconds)
    bound = setting.window + 2 * policy.most + BATCH_ROWS
    for i in range(setting.shards):
        mine = setting.rows // setting.shards + (i < setting.rows % setting.shards)
        machine.start(_shard(machine, lake, Shard(setting, policy, mine, bound), costs, rng))
    machine.run()
    return Ran(setting, machine.now, lake.commits, lake.attempts, lake.failed, lake.slowest)


def _shard(machine: Machine, lake: Lake, shard: Shard, costs: Costs, rng: random.Random) -> Process:
    yield shard.setting.find + rng.uniform(0, 1)  # flow runs do not start at the same moment
    shard.since = begun = last = machine.now
    while shard.left or shard.finished:
        group_since = machine.now
        wait = _until_due(shard, machine.now, group_since, last, begun)
        if wait:
            yield wait
        shard.advance(machine.now)
        rows = min(math.ceil(shard.finished), shard.policy.most)
        yield from _commit(machine, lake, shard, costs, rng, rows)
        shard.advance(machine.now)
        shard.finished = max(0.0, shard.finished - rows)
        last = machine.now


def _until_due(shard: Shard, now: float, group_since: float, last: float, begun: float) -> float:
    """Seconds until the policy closes the group, found by bisection: once it is due, it stays due."""

    def due(then: float) -> bool:
        rows = int(shard.at(then))
        all_done = rows - shard.finished >= shard.left
        ages = then - group_since, then - last, then - begun
        return all_done or (rows > 0 and shard.policy.is_due(rows, *ages, redo=False))

    if due(now):
        return 0.0
    early, late = now, now + shard.policy.seconds + 1.0
    while late - early > POLL:
        middle = (early + late) / 2
        early, late = (early, middle) if due(middle) else (middle, late)
    return late - now


def _commit(
    machine: Machine, lake: Lake, shard: Shard, costs: Costs, rng: random.Random, rows: int
) -> Process:
    started = machine.now
    for pause in (*RETRY_DELAYS, math.inf):
        for attempt in range(ATTEMPTS):
            lake.attempts += 1
            base, files = lake.version, lake.files
            behind = lake.added - shard.seen
            shard.seen = lake.added
            known = shard.known * shard.setting.known

            def cost(part: str) -> float:
                return costs.seconds(part, rows, files, behind, known)  # noqa: B023

            yield Work(cost("log") + cost("join") + cost("write") + cost("rest"))
            shard.known = lake.rows
            if lake.version == base:
                lake.version += 1
                lake.added += 1
                shard.seen += lake.added - shard.seen == 1
                lake.small += 1
                lake.rows += rows
                lake.commits += 1
                lake.slowest = max(lake.slowest, machine.now - started)
                return
            yield rng.uniform(0, min(1.0, 0.02 * 1.5**attempt))
        lake.failed += 1
        if pause == math.inf:
            raise RuntimeError("a commit has lost every attempt")
        yield float(pause)
