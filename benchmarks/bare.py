"""The reference of P1, P3 and P5: `vllm.LLM.generate` with all prompts at once, in a child process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.workload import Row
from vllm_tasks.engines.session import permit_amx

permit_amx()  # the processes that vLLM spawns import this module, too


@dataclass(frozen=True)
class Run:
    """The seconds that a run took, and the number of its output tokens."""

    seconds: float
    tokens: int


def serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Process each list of rows and send its `Run`, until the pipe ends."""
    from vllm import LLM

    llm = LLM(**engine_args)
    try:
        pipe.send("ready")
        while True:
            pipe.send(generate(llm, pipe.recv()))
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=5)


def generate(llm: Any, rows: Sequence[Row]) -> Run:
    from vllm import SamplingParams

    started = time.perf_counter()
    # The same sampling parameters as the calls of `predict_batches`.
    params = [SamplingParams(**row.parameters()) for row in rows]
    outputs = llm.generate([row.prompt for row in rows], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return Run(seconds, sum(len(output.outputs[0].token_ids) for output in outputs))
