"""lm-evaluation-harness's client `local-completions`, in its own environment (see `benchmarks.harness`).

Each run is a separate evaluation with the rows as its task; its imports count as start-up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import METRIC, Harness, HarnessFailed
from benchmarks.peers.side import Outcome, answer_all, dead
from benchmarks.workload import Row

NAME = "lm-evaluation-harness"
NEVER = "<|never|>"
"""The stop word that it sends with each request; it does not occur in answers."""


def serve(pipe: Connection, url: str, model: str, concurrency: int) -> None:
    answer_all(pipe, {NAME: partial(through, url, model, concurrency)})


def through(url: str, model: str, concurrency: int, rows: Sequence[Row]) -> Outcome:
    """The outcome for rows with answers of one length; the server counts the tokens."""
    (tokens,) = {row.max_tokens for row in rows}
    texts = [{"question": row.prompt, "answer": ""} for row in rows]
    started = time.perf_counter()
    try:
        with Harness(task(tokens), texts) as harness:
            found = harness.run(url, model, concurrency)
    except HarnessFailed as error:
        return dead(started, error)
    answers = found.rows["take"]
    return Outcome(found.seconds, tokens * len(answers), len(answers), startup=harness.startup)


def task(tokens: int) -> dict[str, Any]:
    """The task file: greedy answers of one length, with a score, which is not used."""
    sampling = {"until": [NEVER], "do_sample": False, "temperature": 0.0}
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {**sampling, "max_gen_toks": tokens, "ignore_eos": True},
        "filter_list": [{"name": "take", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
