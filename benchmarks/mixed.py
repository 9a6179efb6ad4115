"""MIXED: rows with different `max_tokens` in one call, in output tokens/s; goal >= 1.0.

Each row has its own number of tokens, by a `prompt_func` that returns a `Request`. One line is against one
concurrent call for each number on the same engine, which is what P1 and P2 measure; the other against
`vllm bench serve`, on the same server without a prefix cache, as in P2.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from benchmarks import bench_serve, ours
from benchmarks.options import Options
from benchmarks.pairs import interleave, line
from benchmarks.workload import Row, output_tokens, questions, rows
from vllm_tasks import Request, VllmAPI, VllmModel

ONE, EACH = "one call", "one call for each max_tokens"
BENCH = "vllm bench serve"


def with_its_own(row: Row) -> Request:
    return Request(row.prompt, {"max_tokens": row.max_tokens})


def seconds_of_one(model: VllmAPI | VllmModel, batch: Sequence[Row]) -> float:
    """Seconds that the rows take in one call."""
    started = time.perf_counter()
    model.predict_batches(batch)
    return time.perf_counter() - started


def measure(options: Options) -> Iterator[str]:
    """One line for the local engine, and one for a server."""
    texts = questions(options.data, options.rows)
    note = f"; {options.rows} rows, {options.lengths} output tokens"

    def batch(round_: int) -> list[Row]:
        return rows(texts, options.lengths, round_)

    each = ours.local_model(options)
    one = each.model_copy(update={"prompt_func": with_its_own})
    with each:
        for answer, row in zip(one.completions(batch(0)[:8]), batch(0)[:8], strict=True):
            assert getattr(answer, "completion_tokens", None) == row.max_tokens
        sides = {
            # Prompts of its own for each side: they share an engine, which caches prefixes.
            ONE: lambda round_: (
                output_tokens(batch(2 * round_ + 1)) / seconds_of_one(one, batch(2 * round_ + 1))
            ),
            EACH: lambda round_: (
                output_tokens(batch(2 * round_ + 2)) / ours.seconds_of(each, batch(2 * round_ + 2))
            ),
        }
        rates = interleave(sides, EACH, options.least, options.most)
    yield line("MIXED", ONE, rates, EACH, "output tokens/s") + note + "; goal >= 1.0"
    with bench_serve.beside(options) as (url, bench_rate):
        model = VllmAPI(
            identifier="bench",
            api_url=url,
            max_in_flight=options.concurrency,
            predict_kwargs=ours.GREEDY,
            prompt_func=with_its_own,
        )
        served = {
            ONE: lambda round_: output_tokens(batch(round_)) / seconds_of_one(model, batch(round_)),
            BENCH: lambda round_: bench_rate(batch(round_)),
        }
        rates = interleave(served, BENCH, options.least, options.most)
    flight = f", {options.concurrency} in flight"
    yield line("MIXED", ONE, rates, BENCH, "output tokens/s") + note + flight + "; goal >= 1.0"
