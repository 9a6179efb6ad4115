"""Shards that commit into one lake, as a discrete-event simulation with measured costs.

A shard has an engine that completes rows at a constant rate, and the package's own `CommitPolicy`. It commits
as the writer does: it reads the log and the keys of others' rows, looks for its own keys among them, and
writes, which fails if another one has committed since. Shards are on machines of their own (`cores=None`);
with the cores of this machine, the simulation repeats what was measured here.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.scale.commits import Sample
from vllm_tasks.datalayer.lake.delta_writer import ATTEMPTS
from vllm_tasks.tables.commit_policy import CommitPolicy
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.source_rows import BATCH_ROWS

ONCE, ATTEMPT = ("rest",), ("log", "join", "write")
"""The parts of a commit that are done once, and those that are repeated in each attempt."""
POLL = 0.2
"""Seconds between two looks of a run at its group."""
WARM, SPAN = 300.0, 300.0
"""Simulated seconds before those that count, and those."""
WINDOW = 256
"""Rows in an engine's window."""
IN_A_FILE = 13_000
"""Rows in a file of the size to which files are compacted: 4 MB, and 300 bytes a row."""
Features = tuple[float, ...]
"""What the seconds of a part depend on, linearly."""


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
        """Seconds of work that a process has had that works since the beginning."""

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
        wanted = next(process, None)
        if isinstance(wanted, Work):
            heapq.heappush(self._working, (self._served + wanted.seconds, next(self._order), process))
        elif wanted is not None:
            heapq.heappush(self._waiting, (self.now + wanted, next(self._order), process))


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of a commit, linear in its `features`."""

    of: Mapping[str, Features]

    @classmethod
    def fitted(cls, samples: Iterable[Sample]) -> Costs:
        """The least squares of the relative errors, without what would save time."""
        listed = list(samples)
        what = np.array([features(s.rows, s.files, s.behind, s.known) for s in listed])
        found = {}
        for part in (*ONCE, *ATTEMPT):
            seconds = np.maximum([s.seconds.get(part, 0.0) for s in listed], 1e-4)
            found[part] = _positive(what / seconds[:, None])
        return cls(found)

    def seconds(self, parts: Iterable[str], given: Features) -> float:
        """The seconds of these parts."""
        return sum(c * x for part in parts for c, x in zip(self.of[part], given, strict=True))


def _positive(what: np.ndarray) -> Features:
    """Coefficients for which the rows of `what` add up to 1; the most negative one is dropped, again and
    again, until there is none."""
    kept = np.ones(what.shape[1], dtype=bool)
    while True:
        found = np.zeros(what.shape[1])
        found[kept] = np.linalg.lstsq(what[:, kept], np.ones(len(what)), rcond=None)[0]
        if found.min() >= 0:
            return tuple(found.tolist())
        kept[found.argmin()] = False


def features(rows: float, files: float, behind: float, known: float) -> Features:
    """A constant, rows of the group, files of the table, whether others have committed, and then also by
    files, their commits, and known keys."""
    others = float(behind > 0)
    return 1.0, rows, files, others, others * files, behind, known


@dataclass
class Lake:
    """The one lake, and what its writers have done in all."""

    version: int = 0
    rows: int = 0
    attempts: int = 0
    failed: int = 0
    """Commits that have lost all attempts, and those after each of `RETRY_DELAYS`, too."""
    slowest: float = 0.0

    @property
    def files(self) -> float:
        """Files of the table, as compactions leave them."""
        return self.rows / IN_A_FILE + min(self.version, 100)


@dataclass(frozen=True)
class Setting:
    """A run to simulate: shards with engines of `rate` rows/s, in a table that has `there` rows of the run.

    A writer remembers the fraction `known` of these rows' keys.
    """

    shards: int
    rate: float
    commit_rows: int
    there: int
    known: float
    commit_seconds: float = 30.0


@dataclass(frozen=True)
class Ran:
    """What was committed within some seconds of a simulated run, by how many attempts."""

    seconds: float
    rows: int
    commits: int
    attempts: int
    failed: int
    slowest: float

    @property
    def rate(self) -> float:
        """Rows a second of all shards."""
        return self.rows / self.seconds


class Shard:
    """A shard: its engine, and the rows that are finished and not committed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.policy = CommitPolicy.of(None, setting.commit_rows, setting.commit_seconds)
        self.finished = self.since = 0.0
        self.bound = WINDOW + 2 * self.policy.most + BATCH_ROWS

    def at(self, now: float) -> float:
        """The rows that are finished and not committed; the engine waits when they reach the bound."""
        return max(self.finished, min(self.finished + self.setting.rate * (now - self.since), self.bound))

    def advance(self, now: float) -> None:
        """Count what the engine has completed until now."""
        self.finished, self.since = self.at(now), now

    def until_due(self, now: float, last: float, begun: float) -> float:
        """Seconds until the policy closes a group that begins now; once it is due, it stays due."""

        def due(then: float) -> bool:
            ages = then - now, then - last, then - begun
            return self.policy.is_due(int(self.at(then)), *ages, redo=False)

        early, late = now, now + POLL
        while not due(late):
            early, late = late, now + 2 * (late - now)
        while late - early > POLL and not due(early):
            middle = (early + late) / 2
            early, late = (early, middle) if due(middle) else (middle, late)
        return (early if due(early) else late) - now


def ran(setting: Setting, costs: Costs, seed: int = 0) -> Ran:
    """Simulate a run for `WARM` seconds, and then for `SPAN`, which count."""
    machine, lake, rng = Machine(), Lake(rows=setting.there), random.Random(seed)
    for _ in range(setting.shards):
        machine.start(_shard(machine, lake, Shard(setting), costs, rng))
    machine.run(WARM)
    before = replace(lake)
    machine.run(WARM + SPAN)
    return Ran(
        SPAN,
        lake.rows - before.rows,
        lake.version - before.version,
        lake.attempts - before.attempts,
        lake.failed,
        lake.slowest,
    )


def _shard(machine: Machine, lake: Lake, shard: Shard, costs: Costs, rng: random.Random) -> Process:
    yield rng.uniform(0, 30)  # flow runs do not start at the same moment
    begun = last = shard.since = machine.now
    writer = _Writer(machine, lake, costs, rng, shard.setting.known)
    while True:
        yield shard.until_due(machine.now, last, begun)
        shard.advance(machine.now)
        rows = min(int(shard.finished), shard.policy.most)
        if rows:
            yield from writer.commit(rows)
        shard.advance(machine.now)
        shard.finished, last = shard.finished - rows, machine.now


def contend(writers: int, group: int, seconds: float, costs: Costs, cores: float) -> Ran:
    """Simulate writers on one machine that commit groups one after another, as `commits.contended`."""
    machine, lake, rng = Machine(cores), Lake(), random.Random(0)

    def writes() -> Process:
        writer = _Writer(machine, lake, costs, rng, 1.0)
        while True:
            yield from writer.commit(group)

    for _ in range(writers):
        machine.start(writes())
    machine.run(seconds)
    return Ran(seconds, lake.rows, lake.version, lake.attempts, lake.failed, lake.slowest)


class _Writer:
    """A writer to the lake."""

    def __init__(self, machine: Machine, lake: Lake, costs: Costs, rng: random.Random, known: float) -> None:
        self._machine, self._lake, self._costs, self._rng = machine, lake, costs, rng
        self._known = known
        self._seen = lake.version

    def commit(self, rows: int) -> Process:
        """Commit so many rows, after losing any number of times."""
        started, lake = self._machine.now, self._lake
        yield Work(self._costs.seconds(ONCE, features(rows, lake.files, 0, 0)))
        for pause in itertools.chain(RETRY_DELAYS, itertools.repeat(None)):
            for attempt in range(ATTEMPTS):
                lake.attempts += 1
                base, behind = lake.version, lake.version - self._seen
                self._seen = base
                given = features(rows, lake.files, behind, self._known * lake.rows)
                yield Work(self._costs.seconds(ATTEMPT, given))
                if lake.version == base:
                    lake.version, lake.rows = base + 1, lake.rows + rows
                    lake.slowest = max(lake.slowest, self._machine.now - started)
                    self._seen = lake.version
                    return
                yield self._rng.uniform(0, min(1.0, 0.02 * 1.5**attempt))
            lake.failed += pause is None  # and with it the run; the simulation goes on
            yield float(pause or RETRY_DELAYS[-1])
