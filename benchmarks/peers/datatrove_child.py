"""datatrove in its own interpreter (see `benchmarks.peers.foreign`): `InferenceRunner` with an endpoint."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document  # type: ignore[import-not-found]
from datatrove.pipeline.inference.run_inference import (  # type: ignore[import-not-found]
    InferenceConfig,
    InferenceRunner,
)
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-not-found]


def main(url: str, model: str, concurrency: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its own output goes to the log
    print("ready", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        found = run(json.loads(line), url, model, int(concurrency), Path(folder) / str(number))
        print(json.dumps(found), file=answers, flush=True)


OUTPUTS = "${rank}_${chunk_index}.jsonl"
"""The pattern of file names that its checkpoints need."""


async def rollout(document: Any, generate: Any) -> Any:
    """Send one request for a document."""
    return await generate({"prompt": document.text})


def run(order: dict[str, Any], url: str, model: str, concurrency: int, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=url,
        model_name_or_path=model,
        use_chat=False,
        default_generation_params={"temperature": 0, "max_tokens": order["max_tokens"], "ignore_eos": True},
        max_concurrent_generations=concurrency,
    )
    runner = InferenceRunner(
        rollout_fn=rollout,
        config=config,
        output_writer=JsonlWriter(str(folder / "out"), output_filename=OUTPUTS, compression=None),
        skip_bad_requests=True,
        # Its record of completed rows, which it resumes from.
        checkpoints_local_dir=str(folder / "checkpoints") if order["resume"] else None,
        records_per_chunk=32,
    )
    documents = [Document(text=prompt, id=str(i)) for i, prompt in enumerate(order["prompts"])]
    try:
        runner.run(documents)
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return {"died": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - started
    lines = [line for file in (folder / "out").iterdir() for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    results = [row["metadata"]["rollout_results"] for row in found]
    return {
        "seconds": seconds,
        "completed": len({row["id"] for row in found if row["metadata"]["rollout_results"]}),
        "errors": sum(not result for result in results),
        "tokens": sum(one["usage"]["completion_tokens"] for result in results for one in result),
        "stored": len(found),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
