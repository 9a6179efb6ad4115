"""The upper limits: `LLM.generate` and `AsyncLLM` directly, with all rows at once.

The engine of the first also runs the older system's way: chunks of 4 rows, one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import bare
from benchmarks.peers.side import Outcome, answer_all, dead
from benchmarks.workload import Row

GENERATE, ASYNC = "LLM.generate", "AsyncLLM"
EMBED, SCORE = "LLM.embed", "LLM.score"
ALL = (GENERATE, ASYNC, EMBED, SCORE)
CHUNKS = "older: LLM.generate, chunks of 4"


def serve_llm(pipe: Connection, engine_args: dict[str, Any]) -> None:
    from vllm import LLM

    llm = LLM(**engine_args)
    try:
        answer_all(pipe, {GENERATE: partial(through_llm, llm), CHUNKS: partial(in_chunks, llm)})
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=5)


def through_llm(llm: Any, rows: Sequence[Row]) -> Outcome:
    started = time.perf_counter()
    try:
        run = bare.generate(llm, rows)
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return dead(started, error)
    return Outcome(run.seconds, run.tokens, len(rows))


def in_chunks(llm: Any, rows: Sequence[Row]) -> Outcome:
    started = time.perf_counter()
    runs = [bare.generate(llm, rows[first : first + 4]) for first in range(0, len(rows), 4)]
    return Outcome(time.perf_counter() - started, sum(run.tokens for run in runs), len(rows))


def serve_pooling(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Embed texts with `LLM.embed`, and score pairs with `LLM.score`."""
    from vllm import LLM

    llm = LLM(**engine_args)

    def embed(rows: Sequence[Row]) -> int:
        return len(llm.embed([row.prompt for row in rows], use_tqdm=False))

    def score(rows: Sequence[Row]) -> int:
        return len(llm.score([row.prompt for row in rows], [row.second for row in rows], use_tqdm=False))

    try:
        answer_all(pipe, {EMBED: partial(pooled, embed), SCORE: partial(pooled, score)})
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=5)


def pooled(work: Callable[[Sequence[Row]], int], rows: Sequence[Row]) -> Outcome:
    started = time.perf_counter()
    count = work(rows)
    return Outcome(time.perf_counter() - started, 0, count)


def serve_async(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """`AsyncLLM`, which needs an event loop that lives as long as the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    with asyncio.Runner() as runner:

        async def start() -> Any:
            # As in `LLM`, without statistics at each step.
            args = AsyncEngineArgs(**{"disable_log_stats": True, **engine_args})
            return AsyncLLM.from_engine_args(args)

        engine = runner.run(start())
        try:
            answer_all(pipe, {ASYNC: lambda rows: runner.run(through_async(engine, rows))})
        finally:
            engine.shutdown(timeout=5)


async def through_async(engine: Any, rows: Sequence[Row]) -> Outcome:
    started = time.perf_counter()
    requests = [of_row(engine, str(i), row) for i, row in enumerate(rows)]
    found = await asyncio.gather(*requests, return_exceptions=True)
    tokens = [made for made in found if isinstance(made, int)]
    return Outcome(time.perf_counter() - started, sum(tokens), len(tokens), len(rows) - len(tokens))


async def of_row(engine: Any, name: str, row: Row) -> int:
    """The number of tokens of an answer, which comes as one output."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(**row.parameters(), output_kind=RequestOutputKind.FINAL_ONLY)
    async for output in engine.generate(row.prompt, params, name):
        last = output
    return len(last.outputs[0].token_ids)
