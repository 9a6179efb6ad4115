"""Options of a run of the benchmarks."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE = {
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 2**30,
    # Without these two, vLLM's defaults for `LLM` are twice those for a server or an AsyncLLM.
    "max_num_seqs": 128,
    "max_num_batched_tokens": 4096,
    # Sampling depends only on the call, on every side.
    "generation_config": "vllm",
}
"""Engine arguments of both sides; `--engine` adds to them."""


@dataclass(frozen=True)
class Options:
    """The options of one run.

    `least` and `most` limit the number of pairs. `lengths` are numbers of output tokens, each for an equal
    number of rows. `concurrency` is the number of rows in flight of P2, P10, MIXED and PARITY, `sizes` the
    numbers of rows of P6; `minutes` and `samples` belong to LONG-RUN.
    """

    measures: tuple[str, ...]
    data: Path | None
    model: Path | None
    rows: int
    least: int
    most: int
    lengths: tuple[int, ...]
    concurrency: int
    sizes: tuple[int, ...]
    minutes: float
    samples: Path | None
    engine: dict[str, Any]

    def engine_args(self) -> dict[str, Any]:
        """vLLM's engine arguments, including the model."""
        from flows.smollm2 import number_type

        model = {"model": str(self._model_folder()), "trust_remote_code": True, "dtype": number_type()}
        return {**model, **ENGINE, **self.engine}

    def _model_folder(self) -> Path:
        if self.model is not None:
            return self.model
        from flows.smollm2 import model_folder

        return model_folder()


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str], known: tuple[str, ...]) -> Options:
    """Options from the command line; exits with a message for unknown ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("measures", nargs="*", metavar="MEASURE", help=f"any of {' '.join(known)}; default: all")
    add("--data", type=Path, help="JSONL with the prompts as `question` (and `answer`); default: made up")
    add("--model", type=Path, help="folder of the model; default: the demo's SmolLM2")
    add("--rows", type=int, default=512, help="rows of a call, where a measure has no number of its own")
    add("--pairs", type=int, default=5, help="least number of pairs")
    add("--most-pairs", type=int, default=15, help="largest number of pairs, if intervals stay wide")
    add("--lengths", type=whole_numbers, default=(8, 16, 24, 32, 40, 48, 56, 64), help="output tokens")
    add("--concurrency", type=int, default=64, help="rows in flight of P2, P10, MIXED and PARITY")
    add("--sizes", type=whole_numbers, default=(10_000, 50_000, 200_000), help="rows of P6")
    add("--minutes", type=float, default=120.0, help="how long LONG-RUN uses the tiny engine")
    add("--samples", type=Path, help="JSONL of LONG-RUN's samples; --minutes 0 only reports it again")
    add("--engine", type=json.loads, default={}, help="further engine arguments of both sides, as JSON")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.measures} - {*known}):
        parser.error(f"unknown measures {unknown}; known are {list(known)}")
    return Options(
        measures=tuple(given.measures) or known,
        data=given.data,
        model=given.model,
        rows=given.rows,
        least=given.pairs,
        most=max(given.pairs, given.most_pairs),
        lengths=given.lengths,
        concurrency=given.concurrency,
        sizes=given.sizes,
        minutes=given.minutes,
        samples=given.samples,
        engine=given.engine,
    )
