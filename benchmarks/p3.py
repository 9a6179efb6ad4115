"""P3: `predict_in_db` in a flow, with Prefect, reading and commits, against `LLM.generate`; goal >= 0.95.

Rows are read from a Parquet file and outputs are committed to a Delta table; `LLM.generate` gets the same
prompts as a list and keeps its answers in memory. Keys and texts are distinct, so no requests are folded. On
both sides an answer ends where the model ends it, or at `MAX_TOKENS`, and the generated tokens are counted. A
Prefect server runs during both; its start is not measured, but the flow run is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from benchmarks import bare, ours
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import interleave, line
from benchmarks.workload import Row, questions
from vllm_tasks import predict_in_db
from vllm_tasks.results import Report

OURS, BARE = "predict_in_db", "LLM.generate"
ROWS = 2000
MAX_TOKENS = 32


def measure(options: Options) -> Iterator[str]:
    """One line: output tokens a second."""
    texts = questions(options.data, ROWS)
    model = ours.local_model(options)
    with (
        tempfile.TemporaryDirectory() as folder,
        prefect_test_harness(server_startup_timeout=120),
        Child(bare.serve, options.engine_args()) as engine,
        model,
    ):

        @flow
        def nightly(lake: str) -> Report:
            return predict_in_db(model, "text", "rows", db=lake, max_tokens=MAX_TOKENS, ignore_eos=False)

        def our_rate(round_: int) -> float:
            lake = Path(folder) / str(round_)
            write_source(lake, prompts_of(texts, round_))
            started = time.perf_counter()
            report = nightly(str(lake))
            seconds = time.perf_counter() - started
            assert report.succeeded == ROWS, report
            return report.completion_tokens / seconds

        def bare_rate(round_: int) -> float:
            run: bare.Run = engine.request(
                [Row(prompt, MAX_TOKENS, ignore_eos=False) for prompt in prompts_of(texts, round_)]
            )
            return run.tokens / run.seconds

        rates = interleave({OURS: our_rate, BARE: bare_rate}, BARE, options.least, options.most)
    note = f"; {ROWS} rows, up to {MAX_TOKENS} output tokens; goal >= 0.95"
    yield line("P3", OURS, rates, BARE, "output tokens/s") + note


def prompts_of(texts: list[str], round_: int) -> list[str]:
    """Prompts with the number of the round first, so that no prefix cache has them from an earlier one."""
    return [f"({round_:03d}) {text}" for text in texts]


def write_source(lake: Path, prompts: list[str]) -> None:
    lake.mkdir()
    pq.write_table(pa.table({"id": range(len(prompts)), "text": prompts}), lake / "rows.parquet")
