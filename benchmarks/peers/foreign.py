"""Clients in environments of their own: a script there, a JSON line in for each run and one out.

A script is given the server's URL, the model's name, the rows in flight and a folder of its own. It says
`ready`; then of `{"prompts", "max_tokens", "resume"}` it makes `{"seconds", "answered", "errors", "tokens"}`.
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
    "distilabel": "distilabel: OpenAILLM",
    "datatrove": "datatrove: InferenceRunner",
}
QUIET = {
    "TELEMETRY_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CURATOR_VIEWER": "0",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Nobody is told of a run, and nothing is fetched."""


def serve(
    pipe: Connection, name: str, url: str, model: str, concurrency: int, folder: str | None = None
) -> None:
    """`folder` is one that was there before and will be there after a crash: then it resumes by it."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        started(name, url, model, concurrency, folder or scratch) as process,
    ):
        try:
            line_of(process)  # it is ready
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
    """What it makes of rows with answers of one length; a run that ends as a whole is in its last words."""
    (tokens,) = {row.max_tokens for row in rows}
    assert process.stdin is not None
    begun = time.perf_counter()
    order = {"prompts": [row.prompt for row in rows], "max_tokens": tokens, "resume": resume}
    print(json.dumps(order), file=process.stdin, flush=True)
    found = json.loads(line_of(process))
    if "died" in found:
        return Outcome(time.perf_counter() - begun, 0, 0, died=found["died"])
    counts = found["tokens"], found["answered"], found["errors"]
    return Outcome(found["seconds"], *counts, stored=found.get("stored", 0))


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("it ended")
    return line
