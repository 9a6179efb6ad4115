"""P10: `validate` against lm-evaluation-harness, in rows/s of the complete run; goal: at least as fast.

Both sides use the same rows, requests, number of requests in flight, and server. The server does not cache
prefixes, since both sides send the same prompts. Both sides are resident. The time is that of
lm-evaluation-harness's `simple_evaluate` (its data set is cached on disk from the second run on), and of our
`validate` in a flow, which also writes answers, scores and history into a lake, compares with the run before
and displays its report. The imports of each side are timed separately; a Prefect server runs before.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from prefect.testing.utilities import prefect_test_harness

from benchmarks import lm_eval_parity, servers
from benchmarks.children import Child
from benchmarks.harness import Harness
from benchmarks.options import Options
from benchmarks.pairs import interleave, line

OURS, THEIRS = "validate", "lm-evaluation-harness"
IMPORTS = (
    "vllm_tasks.datalayer.lake.lake, vllm_tasks.engines.http.engine, vllm_tasks.metrics.numeric_match, "
    "vllm_tasks.validation.run, vllm_tasks.validation.pages"
)


def measure(options: Options) -> Iterator[str]:
    """One line for the runs, and one for the start."""
    rows = lm_eval_parity.labelled(options.data, options.rows)
    arguments = {**options.engine_args(), "enable_prefix_caching": False}
    with ExitStack() as stack:
        lake = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(prefect_test_harness(server_startup_timeout=120))
        server = stack.enter_context(Child(servers.serve, arguments))
        harness = stack.enter_context(Harness(lm_eval_parity.TASK, rows))
        model = lm_eval_parity.model_of(server.ready, options.concurrency)

        def our_rate(_round: int) -> float:
            return len(rows) / lm_eval_parity.validated(model, rows, lake).seconds

        def their_rate(_round: int) -> float:
            outcome = harness.run(server.ready, arguments["model"], options.concurrency)
            return len(rows) / outcome.seconds

        rates = interleave({OURS: our_rate, THEIRS: their_rate}, THEIRS, options.least, options.most)
        note = f"; {len(rows)} rows, {options.concurrency} in flight; goal >= 1"
        yield line("P10", OURS, rates, THEIRS, "rows/s") + note
        yield f"P10 {import_seconds():.1f} s to start with {OURS}, {harness.startup:.1f} s with {THEIRS}"


def import_seconds() -> float:
    """The seconds in which a fresh interpreter imports all that `validate` uses, also what it imports
    late."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], check=True)
    return time.perf_counter() - started
