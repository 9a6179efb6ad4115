"""bespokelabs-curator in its own interpreter (see `benchmarks.peers.foreign`): its OpenAI client."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import litellm.litellm_core_utils  # type: ignore[import-not-found]

# It would download its tokenizer's file, but one of its packages contains the file.
os.environ["TIKTOKEN_CACHE_DIR"] = f"{litellm.litellm_core_utils.__path__[0]}/tokenizers"

from bespokelabs import curator  # type: ignore[import-not-found]


class Plain(curator.LLM):  # type: ignore[misc]
    """Prompts are the rows' texts, and answers are stored as texts."""

    def prompt(self, row: dict[str, Any]) -> str:
        text: str = row["prompt"]
        return text

    def parse(self, row: dict[str, Any], response: str) -> dict[str, Any]:
        return {"id": row["id"], "output": response}


def main(url: str, model: str, concurrency: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its own output goes to the log
    print("ready", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        found = run(json.loads(line), url, model, int(concurrency), f"{folder}/{number}")
        print(json.dumps(found), file=answers, flush=True)


def run(order: dict[str, Any], url: str, model: str, concurrency: int, folder: str) -> dict[str, Any]:
    started = time.perf_counter()
    llm = Plain(
        model_name=model,
        backend="openai",
        generation_params={"temperature": 0, "max_tokens": order["max_tokens"], "ignore_eos": True},
        backend_params={
            "base_url": f"{url}/v1",
            "api_key": "none",
            "max_concurrent_requests": concurrency,
            "max_requests_per_minute": 10**9,
            "max_tokens_per_minute": 10**12,
            "max_retries": 2,
            "require_all_responses": False,
            "invalid_finish_reasons": ["content_filter"],  # by default also a truncated answer
        },
    )
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(order["prompts"])]
    try:
        response = llm(rows, working_dir=folder)
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return {"died": f"{type(error).__name__}: {error}"}
    completed = len({row["id"] for row in response.dataset if row["output"] is not None})
    return {
        "seconds": time.perf_counter() - started,
        "completed": completed,
        "errors": failures(response.failed_requests_path),
        "tokens": completed * order["max_tokens"],
        "stored": len(response.dataset),
    }


def failures(file: Path | None) -> int:
    """The number of rows in the file of failed requests."""
    return len(file.read_text().splitlines()) if file is not None and file.exists() else 0


if __name__ == "__main__":
    main(*sys.argv[1:])
