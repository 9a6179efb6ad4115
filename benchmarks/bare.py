"""The reference of P1, P3 and P5: `vllm.LLM.generate` with all prompts at once, in a child."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.workload import Row
from vllm_tasks.engines.session import permit_amx

permit_amx()  # what vLLM spawns imports this, too


@dataclass(frozen=True)
class Run:
    """What a run took, in seconds, and how many tokens came out."""

    seconds: float
    tokens: int


def serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Answer each list of rows with its `Run`, until the pipe ends."""
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
    # `temperature=0` and all else as the calls of `predict_batches` have it.
    params = [
        SamplingParams(temperature=0, ignore_eos=row.ignore_eos, max_tokens=row.max_tokens) for row in rows
    ]
    outputs = llm.generate([row.prompt for row in rows], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return Run(seconds, sum(len(output.outputs[0].token_ids) for output in outputs))
