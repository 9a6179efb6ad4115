"""Clients in environments of their own, run by a script that reads and writes one JSON line for each run.

The arguments of a script are the server's URL, the model's name, the rows in flight, and a folder. It prints
`ready`, and then for each `{"prompts", "max_tokens", "resume"}` one `{"seconds", "completed", "errors",
"tokens"}`, with its `startup` in seconds if each run has one.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.side import Outcome, answer_all
from benchmarks.workload import Row

NAMES = {
    "curator": "bespokelabs-curator",
    "daft": "Daft: prompt",
    "distilabel": "distilabel: OpenAILLM",
    "datatrove": "datatrove: InferenceRunner",
}
QUIET = {
    "TELEMETRY_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CURATOR_VIEWER": "0",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Disables telemetry and downloads."""


def serve(
    pipe: Connection, name: str, url: str, model: str, concurrency: int, folder: str | None = None
) -> None:
    """Process rows with the script of `name`; given a `folder`, which remains after a crash, it resumes."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        started(name, url, model, concurrency, folder or scratch) as process,
    ):
        try:
            line_of(process)  # waits for `ready`
            answer_all(pipe, {NAMES[name]: lambda rows: through(process, rows, folder is not None)})
        finally:
            process.kill()


def started(name: str, url: str, model: str, concurrency: int, folder: str) -> subprocess.Popen[str]:
    script = Path(__file__).with_name(f"{name}_child.py")
    command = [str(environments.interpreter(name)), "-P", str(script), url, model, str(concurrency), folder]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET, "HOME": folder, "HF_HOME": folder},
    )


def through(process: subprocess.Popen[str], rows: Sequence[Row], resume: bool) -> Outcome:
    """The outcome for rows with answers of one length; if the complete run failed, `died` has the error."""
    (tokens,) = {row.max_tokens for row in rows}
    assert process.stdin is not None
    begun = time.perf_counter()
    order = {"prompts": [row.prompt for row in rows], "max_tokens": tokens, "resume": resume}
    print(json.dumps(order), file=process.stdin, flush=True)
    found = json.loads(line_of(process))
    if "died" in found:
        return Outcome(time.perf_counter() - begun, 0, 0, died=found["died"])
    counts = found["tokens"], found["completed"], found["errors"], found.get("startup", 0.0)
    return Outcome(found["seconds"], *counts, stored=found.get("stored", 0))


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the script ended")
    return line
