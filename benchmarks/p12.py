"""P12: texts embedded a second, against `vllm.LLM.embed` with all texts at once; goal >= 0.97.
P13: pairs scored a second, against `vllm.LLM.score`; goal >= 0.97.

The model is that of the other measures, used for its last hidden state: its vectors mean little, and cost
what those of a model of its size cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Literal

from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import interleave, line
from benchmarks.workload import questions
from vllm_tasks import VllmModel
from vllm_tasks.calls.prompt_func import Signature

POOLING = {"runner": "pooling", "convert": "embed"}
NOT_POOLING = "generation_config"
OURS = "predict_batches"


def embed(options: Options) -> Iterator[str]:
    """One line: P12."""
    yield from _measure(options, "embed", "P12", "LLM.embed")


def score(options: Options) -> Iterator[str]:
    """One line: P13. Each question is scored with the next one."""
    yield from _measure(options, "score", "P13", "LLM.score")


def _measure(options: Options, task: Literal["embed", "score"], name: str, bare: str) -> Iterator[str]:
    arguments = {**options.engine_args(), **POOLING}
    arguments.pop(NOT_POOLING)
    texts = questions(options.data, options.rows)
    folder = arguments["model"]
    own = {key: value for key, value in arguments.items() if key != "model"}
    signature: Signature = "singleton" if task == "embed" else "*args"
    model = VllmModel(identifier="bench", model_name=folder, task=task, signature=signature, vllm_kwargs=own)

    def ours(round_: int) -> float:
        rows = _rows(texts, task, round_)
        started = time.perf_counter()
        model.predict_batches(rows)
        return len(rows) / (time.perf_counter() - started)

    with Child(_serve, arguments) as engine, model:
        sides = {OURS: ours, bare: lambda round_: engine.request((task, _rows(texts, task, round_)))}
        rates = interleave(sides, bare, options.least, options.most)
    yield line(name, OURS, rates, bare, "rows/s") + f"; {len(texts)} rows; goal >= 0.97"


def _rows(texts: list[str], task: str, round_: int) -> list[Any]:
    """The rows of a round, each text with the round's number, so that no prefix is in a cache."""
    numbered = [f"{round_}: {text}" for text in texts]
    if task == "embed":
        return list(numbered)
    return list(zip(numbered, [*numbered[1:], numbered[0]], strict=True))


def _serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Process each task's rows and send their number a second, until the pipe ends."""
    from vllm import LLM

    llm = LLM(**engine_args)
    try:
        pipe.send("ready")
        while True:
            task, rows = pipe.recv()
            started = time.perf_counter()
            if task == "embed":
                llm.embed(rows, use_tqdm=False)
            else:
                llm.score([query for query, _ in rows], [text for _, text in rows], use_tqdm=False)
            pipe.send(len(rows) / (time.perf_counter() - started))
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=5)
