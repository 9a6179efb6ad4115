"""A side of START: a program that reads a Parquet file and answers its rows, from its first import on.

`python start_child.py SIDE`, with its orders as JSON on stdin. It prints `answered` after its last answer.
Only the sides of this package import it, so the bare side has none of its imports.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


async def bare(orders: dict[str, Any]) -> None:
    """Answer all rows at once with `AsyncLLM`."""
    import pyarrow.parquet as pq
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    runpy.run_path(str(ROOT / "vllm_tasks" / "engines" / "session.py"))["permit_amx"]()
    texts = pq.read_table(orders["source"])["text"].to_pylist()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**orders["engine"], enable_log_requests=False, disable_log_stats=True)
    )
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=orders["max_tokens"])

    async def answer(i: int, text: str) -> None:
        async for _ in engine.generate(text, params, str(i)):
            pass

    await asyncio.gather(*(answer(i, text) for i, text in enumerate(texts)))
    print("answered", flush=True)
    engine.shutdown()


def ours(orders: dict[str, Any], *, served: bool) -> None:
    """Commit an output for each row, with an engine of this process or with a server that runs already."""
    from vllm_tasks import VllmModel, serve

    arguments = dict(orders["engine"])
    model = VllmModel(
        identifier="start", model_name=arguments.pop("model"), chat=False, vllm_kwargs=arguments
    )
    call = {"temperature": 0, "ignore_eos": True, "max_tokens": orders["max_tokens"]}
    source = Path(orders["source"])

    def run(each: Any) -> None:
        report = each.predict_in_db("text", source.stem, db=str(source.parent), **call)
        assert report.succeeded == orders["rows"], report
        print("answered", flush=True)

    if served:
        with serve(model) as api:
            run(api)
    else:
        run(model)


if __name__ == "__main__":
    side, orders = sys.argv[1], json.load(sys.stdin)
    if side == "bare":
        asyncio.run(bare(orders))
    else:
        ours(orders, served=side == "served")
