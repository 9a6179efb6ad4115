"""P1: `VllmModel.predict_batches` against `vllm.LLM.generate`, in output tokens/s; goal >= 0.97.

Both engines have the same arguments and stay resident, and one works at a time; an idle engine uses no CPU
(vLLM's worker stops spinning one second after its last work, and `pairs.SETTLE` is longer). Rows have
different numbers of output tokens. `LLM.generate` takes a list of sampling parameters for that; ours is one
concurrent call for each number on one engine (MIXED measures one call with all numbers). Prefix caching is
vLLM's default on both sides; every round has prompts of its own, and so has each of the two sides that share
an engine.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import bare, ours
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.pairs import Side, interleave, line
from benchmarks.workload import output_tokens, questions, rows
from vllm_tasks import VllmModel

BARE = "LLM.generate"


def measure(options: Options) -> Iterator[str]:
    """One line for the default `max_batch_size`, and one for None."""
    texts = questions(options.data, options.rows)

    def through(model: VllmModel, own: int) -> Side:
        def rate(round_: int) -> float:
            batch = rows(texts, options.lengths, 2 * round_ + own)
            return output_tokens(batch) / ours.seconds_of(model, batch)

        return rate

    chunked, unchunked = ours.local_model(options), ours.local_model(options, max_batch_size=None)
    with Child(bare.serve, options.engine_args()) as engine, chunked:

        def bare_rate(round_: int) -> float:
            batch = rows(texts, options.lengths, round_)
            run: bare.Run = engine.request(batch)
            assert run.tokens == output_tokens(batch), "LLM.generate made another number of tokens"
            return run.tokens / run.seconds

        ours.check_lengths(chunked, rows(texts[:8], options.lengths, 0))
        default = f"predict_batches (max_batch_size={chunked.max_batch_size})"
        unlimited = "predict_batches (max_batch_size=None)"
        sides = {default: through(chunked, 0), BARE: bare_rate, unlimited: through(unchunked, 1)}
        rates = interleave(sides, BARE, options.least, options.most)
    note = f"; {options.rows} rows, {options.lengths} output tokens; goal >= 0.97"
    for name in (default, unlimited):
        yield line("P1", name, rates, BARE, "output tokens/s") + note
