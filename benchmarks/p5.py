"""P5: rows half of which are repeats, in rows/s, against `vllm.LLM.generate` with all rows; goal >= 1.8.

Decoding is greedy, so `predict_batches` sends equal prompts once. The engine arguments are those of P1, and
everything else is at its default.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import bare, ours
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import interleave, line
from benchmarks.workload import Row, half_repeated, questions, rows

BARE = "LLM.generate"
OURS = "predict_batches"


def measure(options: Options) -> Iterator[str]:
    """One line. All answers have the same length, the mean of `--lengths`, since a call has one length."""
    texts = half_repeated(questions(options.data, options.rows // 2))
    tokens = round(sum(options.lengths) / len(options.lengths))

    def batch(round_: int) -> list[Row]:
        return rows(texts, (tokens,), round_)

    model = ours.local_model(options)
    with Child(bare.serve, options.engine_args()) as engine, model:
        sides = {
            OURS: lambda round_: len(texts) / ours.seconds_of(model, batch(round_)),
            BARE: lambda round_: len(texts) / engine.request(batch(round_)).seconds,
        }
        rates = interleave(sides, BARE, options.least, options.most)
    note = f"; {len(texts)} rows, half of them repeats, {tokens} output tokens; goal >= 1.8"
    yield line("P5", OURS, rates, BARE, "rows/s") + note
