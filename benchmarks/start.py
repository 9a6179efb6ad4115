"""START: seconds from the start of a program until its rows are answered, against one that uses `AsyncLLM`.

Each side is a new Python process that reads a Parquet file of `ROWS` rows. The bare one keeps its answers in
memory, ours commits them to a Delta table. The third finds the server that `serve(model)` of this process has
started, as the second program of an hour does. The page cache is warm after the first round, which does not
count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import ours
from benchmarks.options import Options
from benchmarks.p3 import prompts_of, write_source
from benchmarks.pairs import interleave
from benchmarks.workload import questions
from vllm_tasks import serve

ROWS = 32
MAX_TOKENS = 4
SIDES = {"predict_in_db": "ours", "AsyncLLM": "bare", "predict_in_db with a running server": "served"}
BARE = "AsyncLLM"


def measure(options: Options) -> Iterator[str]:
    """Two lines: the seconds of ours above those of the bare engine, and those with a running server."""
    texts = questions(options.data, ROWS)
    with tempfile.TemporaryDirectory() as folder, serve(ours.local_model(options)):

        def rate(side: str, round_: int) -> float:
            lake = Path(folder) / f"{side}-{round_}"
            write_source(lake, prompts_of(texts, round_))
            orders = {
                "engine": options.engine_args(),
                "source": str(lake / "rows.parquet"),
                "rows": ROWS,
                "max_tokens": MAX_TOKENS,
            }
            return 1 / _seconds_of(side, orders)

        rates = interleave(
            {name: partial(rate, side) for name, side in SIDES.items()},
            BARE,
            options.least,
            options.most,
        )
    seconds = {name: [1 / value for value in values] for name, values in rates.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = len(seconds[BARE])
    for name, own in seconds.items():
        if name != BARE:
            more = [mine - bare for mine, bare in zip(own, seconds[BARE], strict=True)]
            yield (
                f"START {statistics.median(more):+.2f} s of {name} - {BARE}, from the program's start to its "
                f"last answer of {ROWS}; {min(more):+.2f} to {max(more):+.2f}, {pairs} pairs; medians "
                f"{medians[name]:.2f} and {medians[BARE]:.2f} s; goal <= 1 s"
            )


def _seconds_of(side: str, orders: dict[str, object]) -> float:
    """Seconds from the start of a side's process until it has answered."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("start_child.py")), side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            with child.stdin as orders_of_child:
                json.dump(orders, orders_of_child)
            answered = any(line.startswith("answered") for line in child.stdout)
            seconds = time.perf_counter() - started
            child.stdout.read()
        log.seek(0)
        assert answered, log.read()[-4000:].decode(errors="replace")
    return seconds
