"""The reference of PARITY and P10: lm-evaluation-harness, in a process and an environment of its own.

Its `local-completions` sends requests over HTTP and needs neither torch nor a tokenizer for answers that are
texts; it downloads nothing. For each row it sends

    {"prompt", "model", "max_tokens", "temperature", "stop", "seed"}

where `max_tokens` is the task's `max_gen_toks`, `stop` its `until`, and `seed` 1234 by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.environments import uv

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-lm-eval"
CONSTRAINTS = ROOT / "constraints" / "lm_eval.txt"
CHILD = Path(__file__).with_name("lm_eval_child.py")
TASK = "gsm8k_rows"
METRIC = "exact_match"
GRACE = 10.0
"""Seconds in which it may end by itself."""
LOG_TAIL = 4000
"""Bytes of its log that an error shows."""


@dataclass(frozen=True)
class ScoredRow:
    """A row's answer and its score."""

    answer: str
    score: float


@dataclass(frozen=True)
class Outcome:
    """A run: seconds until the value is known, and for each filter the value and the rows in order."""

    seconds: float
    values: dict[str, float]
    rows: dict[str, list[ScoredRow]]


class HarnessFailed(Exception):
    """lm-evaluation-harness ended before it returned a value."""


def interpreter() -> Path:
    """The Python that has lm-evaluation-harness; the first call creates its environment, in seconds."""
    ready = ENVIRONMENT / ".ready"
    if not ready.exists() or ready.stat().st_mtime < CONSTRAINTS.stat().st_mtime:
        into = ("--python", str(ENVIRONMENT), "--constraints", str(CONSTRAINTS))
        uv("venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENT))
        uv("pip", "install", "--quiet", "--compile-bytecode", *into, "lm_eval[api]")
        ready.touch()
    return ENVIRONMENT / "bin" / "python"


class Harness:
    """lm-evaluation-harness with one task over `rows`; `task` has the other fields of the task file.

    The process stays resident, since its imports may take longer than a run; `startup` is their time in
    seconds.
    """

    startup: float

    def __init__(self, task: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="benchmark-lm-eval-")
        self._folder = Path(self._scratch.name)
        data = self._folder / "rows.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        file = {"task": TASK, **source, "test_split": "test", "num_fewshot": 0, **task}
        # JSON is valid YAML.
        (self._folder / f"{TASK}.yaml").write_text(json.dumps(file), encoding="utf-8")

    def __enter__(self) -> Self:
        command = [str(interpreter()), "-P", str(CHILD), str(self._folder)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self._folder / "hf")}
        started = time.perf_counter()
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **offline},
                start_new_session=True,  # Ctrl-C reaches only the benchmark
            )
        try:
            self._line()  # waits for `ready`
        except BaseException:
            self._process.kill()
            raise
        self.startup = time.perf_counter() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.terminate()  # SIGTERM, since it may be in the middle of a run
        self._process.communicate(timeout=GRACE)  # this closes its input, and the process ends
        self._scratch.cleanup()

    def run(self, url: str, model: str, concurrency: int) -> Outcome:
        """Evaluate with the server at `url`: one prompt per request, `concurrency` requests in flight."""
        assert self._process.stdin is not None
        model_args = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "num_concurrent": concurrency,
            "tokenizer_backend": "none",
            "tokenized_requests": False,
        }
        order = {"task": TASK, "metric": METRIC, "model_args": model_args}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        found = json.loads(self._line())
        rows = {name: [ScoredRow(*row) for row in scored] for name, scored in found["rows"].items()}
        return Outcome(found["seconds"], found["values"], rows)

    def likelihoods(self, url: str, model: str, concurrency: int) -> list[list[float]]:
        """The log probabilities of each row's choices, or of its document, with the tokenizer of the server.

        The server needs the endpoint `/tokenizer_info`.
        """
        assert self._process.stdin is not None
        model_args = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "num_concurrent": concurrency,
            "tokenizer_backend": "remote",
        }
        order = {"task": TASK, "metric": None, "model_args": model_args}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        found: list[list[float]] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = (self._folder / "log").read_bytes()[-LOG_TAIL:].decode(errors="replace")
            raise HarnessFailed(f"lm-evaluation-harness ended; the end of its log:\n{tail}")
        return line
