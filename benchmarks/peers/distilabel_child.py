"""distilabel in its own interpreter (see `benchmarks.peers.foreign`): a step with its OpenAI client.

The step `TextGeneration` runs batch by batch, as in a pipeline, but without the pipeline's own processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from distilabel.models import OpenAILLM  # type: ignore[import-not-found]
from distilabel.steps.tasks import TextGeneration  # type: ignore[import-not-found]


def main(url: str, model: str, concurrency: str, folder: str) -> None:
    del folder  # distilabel writes no files here
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its own output goes to the log
    llm = OpenAILLM(model=model, base_url=f"{url}/v1", api_key="none")
    step = TextGeneration(llm=llm, input_batch_size=int(concurrency))
    step.load()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(step, json.loads(line))), file=answers, flush=True)


def run(step: Any, order: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    step.llm.generation_kwargs = {
        "max_new_tokens": order["max_tokens"],
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    rows = [{"instruction": prompt} for prompt in order["prompts"]]
    size = step.input_batch_size
    try:
        found = [
            row for first in range(0, len(rows), size) for row in batch(step, rows[first : first + size])
        ]
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return {"died": f"{type(error).__name__}: {error}"}
    completed = [row for row in found if row["generation"] is not None]
    counts = [
        row["distilabel_metadata"]["statistics_text_generation_0"]["output_tokens"] for row in completed
    ]
    return {
        "seconds": time.perf_counter() - started,
        "completed": len(completed),
        "errors": len(rows) - len(completed),
        "tokens": sum(map(sum, counts)) if counts and isinstance(counts[0], list) else sum(counts),
    }


def batch(step: Any, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = next(step.process(rows))
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
