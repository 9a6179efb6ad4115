"""Our side of P1, P2, P3, P5, MIXED and START: rows through the public methods of a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from benchmarks.options import Options
from benchmarks.workload import Row, by_length
from vllm_tasks import VllmAPI, VllmModel
from vllm_tasks.results import Completion

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 16}
"""Sampling parameters of every side; each call sets its own `max_tokens`."""


def local_model(options: Options, **fields: Any) -> VllmModel:
    """A model whose engine has the same arguments as the reference, and which sends texts as they are."""
    arguments = options.engine_args()
    name = arguments.pop("model")
    return VllmModel(
        identifier="bench",
        model_name=name,
        chat=False,
        predict_kwargs=GREEDY,
        vllm_kwargs=arguments,
        **fields,
    )


def seconds_of(model: VllmAPI | VllmModel, rows: Sequence[Row]) -> float:
    """Seconds that the rows take, with one concurrent call for each `max_tokens`."""
    groups = by_length(rows)
    started = time.perf_counter()
    calls = [in_thread(partial(model.predict_batches, xs, max_tokens=n)) for n, xs in groups.items()]
    for call in calls:
        call.result()
    return time.perf_counter() - started


def in_thread(work: Callable[[], object]) -> Future[object]:
    """Run in a daemon thread, so that an interrupt does not wait for it as for a thread of an executor."""
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by `result()`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_lengths(model: VllmAPI | VllmModel, rows: Sequence[Row]) -> None:
    """Check that each answer has exactly the number of tokens that rates are computed from."""
    for tokens, prompts in by_length(rows).items():
        for answer in model.completions(prompts, max_tokens=tokens):
            assert isinstance(answer, Completion)
            assert answer.completion_tokens == tokens, f"{answer.completion_tokens} tokens, not {tokens}"
