"""P2: `VllmAPI.predict_batches` against `vllm bench serve`, in output tokens/s; goal >= 0.97.

Both sides use the same server, prompts, number of requests in flight, and numbers of output tokens. The
server does not cache prefixes, since both sides send the same prompts. `vllm bench serve` always streams. Our
side is timed from the call to its return; `vllm bench serve` reports its own time.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import bench_serve, ours
from benchmarks.options import Options
from benchmarks.pairs import interleave, line
from benchmarks.workload import output_tokens, questions, rows
from vllm_tasks import VllmAPI

BENCH = "vllm bench serve"
OURS = "VllmAPI.predict_batches"


def measure(options: Options) -> Iterator[str]:
    """One line: output tokens a second."""
    texts = questions(options.data, options.rows)
    with bench_serve.beside(options) as (url, bench_rate):
        model = VllmAPI(
            identifier="bench",
            api_url=url,
            max_in_flight=options.concurrency,
            predict_kwargs=ours.GREEDY,
        )

        def our_rate(round_: int) -> float:
            batch = rows(texts, options.lengths, round_)
            return output_tokens(batch) / ours.seconds_of(model, batch)

        sides = {
            OURS: our_rate,
            BENCH: lambda round_: bench_rate(rows(texts, options.lengths, round_)),
        }
        ours.check_lengths(model, rows(texts[:8], options.lengths, 0))
        rates = interleave(sides, BENCH, options.least, options.most)
    note = f"; {options.rows} rows, {options.concurrency} in flight, {options.lengths} output tokens"
    yield line("P2", OURS, rates, BENCH, "output tokens/s") + note + "; goal >= 0.97"
