"""P6: the cost of a row in our HTTP client; goal: <= 0.3 ms of CPU, and >= 3,000 rows/s a core.

The server responds at once and is a process of its own. The client is a fresh process for each run, so that
its peak memory is that of the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import summarize
from benchmarks.workload import questions

WARM_UP = 1000
"""Rows before a run, which open connections and fill caches."""


@dataclass(frozen=True)
class Cost:
    """The cost of a run of `rows` rows: seconds, CPU seconds, and bytes of memory.

    `before` is the resident memory when the prompts exist, `peak` the largest until the end.
    """

    rows: int
    seconds: float
    cpu: float
    before: int
    peak: int

    @property
    def cpu_ms_per_row(self) -> float:
        return 1000 * self.cpu / self.rows


def client(pipe: Connection, url: str, data: Path | None, count: int) -> None:
    """Send the `Cost` of `count` rows with `VllmAPI.predict_batches`."""
    from vllm_tasks import VllmAPI

    sampling = {"temperature": 0, "max_tokens": 64}
    model = VllmAPI(identifier="bench", api_url=f"{url}/v1/completions", model="m", predict_kwargs=sampling)
    prompts = questions(data, count)
    model.predict_batches(prompts[:WARM_UP])
    pipe.send("ready")
    pipe.recv()
    before = resident("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    answers = model.predict_batches(prompts)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert len(answers) == count
    pipe.send(Cost(count, seconds, cpu, before, resident("VmHWM")))


def resident(name: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS) or at its peak (VmHWM); see proc(5)."""
    status = Path("/proc/self/status").read_text()
    (found,) = [entry for entry in status.splitlines() if entry.startswith(name)]
    return int(found.split()[1]) * 1024


def measure(options: Options) -> Iterator[str]:
    """One line for each number of rows."""
    with Child(scripted.serve) as server:
        for size in options.sizes:
            runs = [run(server, options.data, size) for _ in range(options.least)]
            yield summary([cost for cost, _ in runs], statistics.median(busy for _, busy in runs))


def run(server: Child, data: Path | None, size: int) -> tuple[Cost, float]:
    """The cost of a run, and the fraction of a core that the server used meanwhile."""
    with Child(client, server.ready, data, size) as child:
        used: float = server.request("cpu")
        cost: Cost = child.request("go")
        return cost, (server.request("cpu") - used) / cost.seconds


def summary(costs: list[Cost], server_busy: float) -> str:
    cpu = summarize([cost.cpu_ms_per_row for cost in costs])
    rate = summarize([cost.rows / cost.seconds for cost in costs])
    peak = statistics.median(cost.peak for cost in costs)
    growth = statistics.median((cost.peak - cost.before) / cost.rows for cost in costs)
    return (
        f"P6 {cpu.median:.4f} ms of client CPU a row at {costs[0].rows} rows; {cpu}, {cpu.count} runs; "
        f"{1000 / cpu.median:.0f} rows a CPU second, {rate.median:.0f} rows/s ({rate}); peak RSS "
        f"{peak / 2**20:.0f} MiB, {growth / 2**10:.2f} KiB a row above the prompts; "
        f"server busy {server_busy:.0%} of a core; goal <= 0.3 ms and >= 3000 rows/s a core"
    )
