"""Daft's `prompt` in its own interpreter (see `benchmarks.peers.foreign`): its OpenAI provider.

Each run has a process of its own, whose start counts as start-up: a second `prompt` in one process does not
end (0.7.26).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any


def main(url: str, model: str, *_: str) -> None:
    """Daft's `concurrency` is no limit of rows in flight (200 of 200 were, with 8 and with 64)."""
    once = [sys.executable, "-P", __file__, "once", url, model]
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        done = subprocess.run(once, input=line, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        whole = time.perf_counter() - began
        print(json.dumps({**found, "startup": whole - found.get("seconds", whole)}), flush=True)


def one(url: str, model: str) -> None:
    """The run that the first line of the input orders."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # its own output goes to the log
    import daft  # type: ignore[import-not-found]

    daft.set_provider("openai", base_url=f"{url}/v1", api_key="none")
    print(json.dumps(run(json.loads(sys.stdin.readline()), model)), file=answers, flush=True)


def run(order: dict[str, Any], model: str) -> dict[str, Any]:
    import daft
    from daft.functions import prompt  # type: ignore[import-not-found]

    started = time.perf_counter()
    answer = prompt(
        daft.col("prompt"),
        provider="openai",
        model=model,
        use_chat_completions=True,
        temperature=0,
        max_tokens=order["max_tokens"],
        extra_body={"ignore_eos": True},
        max_retries=2,
        on_error="ignore",
    )
    try:
        frame = daft.from_pydict({"prompt": order["prompts"]}).with_column("output", answer).to_pydict()
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return {"died": f"{type(error).__name__}: {error}"}
    completed = sum(output is not None for output in frame["output"])
    return {
        "seconds": time.perf_counter() - started,
        "completed": completed,
        "errors": len(frame["output"]) - completed,
        "tokens": completed * order["max_tokens"],
    }


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "once" else main(*sys.argv[1:])
