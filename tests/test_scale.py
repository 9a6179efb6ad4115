"""The simulation of SCALE: time, cores, and who wins a commit."""

from __future__ import annotations

import pytest

from benchmarks.scale.commits import Sample
from benchmarks.scale.simulation import Costs, Machine, Process, Setting, Work, contend, features, ran

TENTH = Costs({"rest": (0.0,) * 7, "log": (0.1,) + (0.0,) * 6, "join": (0.0,) * 7, "write": (0.0,) * 7})
"""An attempt to commit takes 0.1 s, whatever the rows."""


def test_processes_share_the_cores() -> None:
    """Three seconds of work each: two processes on one core end after six, one that begins later after it."""
    machine, ended = Machine(cores=1), {}

    def work(name: str, wait: float, seconds: float) -> Process:
        yield wait
        yield Work(seconds)
        ended[name] = machine.now

    for name, wait, seconds in (("a", 0.0, 3.0), ("b", 0.0, 3.0), ("c", 10.0, 1.0)):
        machine.start(work(name, wait, seconds))
    machine.run()
    assert ended == pytest.approx({"a": 6.0, "b": 6.0, "c": 11.0})


def test_costs_are_found_from_samples() -> None:
    """A part that takes 1 ms and 2 µs a row is predicted for other numbers of rows."""
    samples = [
        Sample(rows, seconds={"rest": 0.001, "log": 0.001, "join": 0.001, "write": 0.001 + 2e-6 * rows})
        for rows in (512, 4096, 8192)
    ]
    predicted = Costs.fitted(samples).seconds(("write",), features(2000, 0, 0, 0))
    assert predicted == pytest.approx(0.005)


def test_one_writer_wins_at_a_time() -> None:
    """However many writers there are, commits come one at a time: ten a second at most; all lose attempts."""
    alone = contend(1, 512, 60.0, TENTH, cores=100)
    many = contend(20, 512, 60.0, TENTH, cores=100)
    assert alone.commits == pytest.approx(600, abs=1)
    assert alone.attempts - alone.commits <= 1
    assert 300 < many.commits <= 600
    assert many.attempts > 3 * many.commits


def test_shards_are_efficient_until_the_lake_is_full() -> None:
    """The lake takes 10 groups of at most 8,192 rows a second: 8 engines of 1,000 rows/s fit, and not 120."""
    few = ran(Setting(8, 1000.0, 512, there=0, known=1.0), TENTH)
    many = ran(Setting(120, 1000.0, 512, there=0, known=1.0), TENTH)
    assert 7500 < few.rate <= 8500
    assert few.failed == 0
    assert many.rate < 10 * 8192
