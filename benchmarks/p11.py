"""P11 on Ray: n engines as actors against one; goal: >= 0.9 of n times its rate. Also the rows/s of one
driver.

The engines are real actors, but their host sleeps instead of running vLLM (`slow_host`). On one machine, this
measures the cost of moving rows, not the contention of GPUs. All engines are warm in one process, which runs
a Ray of its own; the number of rows grows with the engines. The limit of a driver is measured with hosts that
respond at once, together with the driver's own CPU, since the actors and hosts share the machine with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import interleave, ratios, summarize
from benchmarks.workload import questions
from vllm_tasks.engines.local import process
from vllm_tasks.engines.ray import actor

if TYPE_CHECKING:
    from vllm_tasks import VllmModel

REPLICAS = (1, 2, 8)
SLOW: dict[str, Any] = {"seqs": 32, "seconds": 0.5}
"""An engine of 64 rows/s."""
ROUNDS = 30
"""Times that a run fills each engine; with many, begin and end, when it is not full, count little."""
AT_ONCE: dict[str, Any] = {"seqs": 128, "seconds": 0.0}
CARRIED = 20_000
"""Rows of a run that measures the driver."""
CARRIERS = (1, 2)
"""Numbers of engines of such a run."""


class SlowActor(actor.HostActor):
    """An actor whose host sleeps."""

    def __init__(self) -> None:
        super().__init__()
        process.HOST = Path(__file__).with_name("slow_host.py")


@dataclass(frozen=True)
class Run:
    """A run of `rows` rows: its seconds, and the driver's CPU seconds."""

    rows: int
    seconds: float
    cpu: float


def measure(options: Options) -> Iterator[str]:
    """One line for each number of engines above one, and one for each number of engines of the driver."""
    with Child(driver, SLOW, REPLICAS, options.data) as child:

        def rate(replicas: int) -> float:
            run: Run = child.request((replicas, replicas * ROUNDS * SLOW["seqs"]))
            return run.rows / run.seconds

        sides = {str(n): lambda _, n=n: rate(n) for n in REPLICAS}
        rates = interleave(sides, "1", options.least, options.most)
    for n in REPLICAS[1:]:
        yield efficiency(n, rates)
    with Child(driver, AT_ONCE, CARRIERS, options.data) as child:
        for n in CARRIERS:
            child.request((n, CARRIED))  # warms up
            yield carried(n, [child.request((n, CARRIED)) for _ in range(options.least)])


def driver(pipe: Connection, arguments: dict[str, Any], replicas: tuple[int, ...], data: Path | None) -> None:
    """For each message `(engines, rows)`, send the `Run` of so many rows over so many engines."""
    actor.HostActor = SlowActor  # type: ignore[misc]
    models = {n: model_of(arguments, n) for n in replicas}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(model)
        pipe.send("ready")
        while True:
            engines, rows = pipe.recv()
            prompts = questions(data, rows)
            started, cpu = time.perf_counter(), time.process_time()
            answers = models[engines].predict_batches(prompts)
            run = Run(rows, time.perf_counter() - started, time.process_time() - cpu)
            assert len(answers) == rows
            pipe.send(run)


def model_of(arguments: dict[str, Any], replicas: int) -> VllmModel:
    from vllm_tasks import VllmModel

    return VllmModel(
        identifier="bench",
        model_name="slow",
        on_ray=True,
        ray_config={"num_gpus": 0, "num_cpus": 0},
        replicas=replicas,
        vllm_kwargs=arguments,
        predict_kwargs={"temperature": 0, "max_tokens": 64},
    )


def efficiency(n: int, rates: dict[str, list[float]]) -> str:
    ratio = summarize([each / n for each in ratios(rates, "1")[str(n)]])
    own, one = summarize(rates[str(n)]).median, summarize(rates["1"]).median
    return (
        f"P11 {ratio.median:.3f} efficiency of {n} replicas on Ray / 1; {ratio}, {ratio.count} rounds; "
        f"{own:.0f} and {one:.0f} rows/s, engines of {SLOW['seqs']} rows at once and {SLOW['seconds']} s "
        "each; goal >= 0.9"
    )


def carried(n: int, runs: list[Run]) -> str:
    rate = summarize([run.rows / run.seconds for run in runs])
    cpu = summarize([1000 * run.cpu / run.rows for run in runs])
    return (
        f"P11 {rate.median:.0f} rows/s from one driver to {n} engine(s) on Ray that respond at once; "
        f"{rate}, {rate.count} runs of {CARRIED:,} rows; {cpu.median:.3f} ms of the driver's CPU a row; {cpu}"
    )
