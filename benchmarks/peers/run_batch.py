"""vLLM's `run-batch` of 0.32, from one JSONL file to another. Its function is called, as the command `vllm`
does not start.

It starts an engine for each run. The start-up is the time until its log reports that it reads the batch, and
the work is the time from then until its file is written. It takes no requests for completions, so a chat
template with only the content turns its messages into the prompts of the other sides.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.peers.side import Outcome, answer_all
from benchmarks.servers import flags
from benchmarks.workload import Row
from vllm_tasks.engines.session import permit_amx

permit_amx()  # also in the processes that vLLM spawns, because they import this main module

NAME = "vLLM run-batch"
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""A chat template that returns the prompt unchanged."""
READS = "Reading batch from"
LOG_TAIL = 4000
"""Characters of its log that an error shows."""


def serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    answer_all(pipe, {NAME: lambda rows: run(engine_args, rows)})


def run(engine_args: dict[str, Any], rows: Sequence[Row]) -> Outcome:
    arguments = flags({"disable_log_stats": True, **engine_args, "chat_template": PLAIN})
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "rows.jsonl", Path(folder) / "answers.jsonl"
        source.write_text("".join(f"{request(engine_args['model'], i, row)}\n" for i, row in enumerate(rows)))
        module = [sys.executable, "-m", "benchmarks.peers.run_batch", "-i", str(source), "-o", str(target)]
        started = time.time()
        process = subprocess.Popen(
            [*module, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        began, log = follow(process)
        if process.wait() != 0 or not target.exists():
            return Outcome(time.time() - started, 0, 0, died=log)
        return outcome(target, work=target.stat().st_mtime - began, startup=began - started)


def request(model: str, number: int, row: Row) -> str:
    body: dict[str, Any]
    if row.second:
        url, body = "/score", {"text_1": row.prompt, "text_2": row.second}
    elif row.max_tokens == 0:
        url, body = "/v1/embeddings", {"input": row.prompt}
    else:
        messages = [{"role": "user", "content": row.prompt}]
        url, body = "/v1/chat/completions", {"messages": messages, **row.parameters()}
    return json.dumps(
        {"custom_id": str(number), "method": "POST", "url": url, "body": {"model": model, **body}}
    )


def follow(process: subprocess.Popen[str]) -> tuple[float, str]:
    """The time at which it began to read the batch, and the end of its log."""
    assert process.stdout is not None
    began, log = time.time(), ""
    for line in process.stdout:
        log = (log + line)[-LOG_TAIL:]
        if READS in line:
            began = time.time()
    return began, log


def outcome(target: Path, work: float, startup: float) -> Outcome:
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    good = [answer["response"]["body"] for answer in answers if not answer["error"]]
    tokens = sum(body["usage"].get("completion_tokens") or 0 for body in good)
    return Outcome(work, tokens, len(good), len(answers) - len(good), startup)


if __name__ == "__main__":
    from vllm.entrypoints.launchers.run_batch import main, parse_args

    asyncio.run(main(parse_args()))
