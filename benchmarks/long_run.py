"""LONG-RUN: checks that no resource leaks, over 2,000,000 rows of a table and hours of an engine.

One process sends 2,000,000 rows with `predict_in_db`, in many calls of one flow, to a scripted server that
sometimes breaks a connection, returns 429 or 500, and refuses one row in 200; then a new process makes the
calls again, to show what memory a table of this size takes. Beside it, another one uses the tiny engine for
`--minutes`: each flow run makes 200 calls within `with model:`, which starts an engine and closes it. A third
one sends the rows of 200 calls to `LLM.generate`, to show what of the memory is vLLM's.
The resources of each process are sampled between calls, and each sample is appended to a JSONL file at once.
SIGTERM ends the run and reports the samples so far.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.held import IDLE, Sample, cpu_of, engine_processes, held
from benchmarks.long_report import read, report
from benchmarks.options import Options
from benchmarks.p7 import model_of, write_rows
from benchmarks.workload import questions

if TYPE_CHECKING:
    from vllm_tasks import VllmModel

ROWS, CALLS = 2_000_000, 40
"""Rows of the table, and calls that process them."""
LIFE, LOOK_EVERY, BATCH = 200, 10, 128
"""Calls between two starts of the engine, calls between two samples, and rows of a call."""
FAILED_LIVES = 3
"""The run ends after so many engines in a row without a completed call."""
ENGINE = {"max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 32}
SAMPLING = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
ENVIRONMENT = {
    # The model runs in EngineCore's process and on one thread, since it shares two cores with us.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    # Another measurement may stop this run meanwhile (SIGSTOP), so a start may take that long.
    "VLLM_TASKS_ENGINE_START_TIMEOUT": "86400",
}


@dataclass
class Record:
    """The samples of a part of the run, kept in a file."""

    part: str
    file: Path
    scratch: Path
    life: int = 0
    calls: int = 0
    rows: int = 0
    failed: int = 0
    began: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Add a sample to the file."""
        seconds, cpu = time.monotonic() - self.began, time.process_time()
        engine = cpu_of(engine_processes())
        counts = (self.part, self.life, self.calls, self.rows, self.failed)
        sample = Sample(*counts, seconds, cpu, engine, held(self.scratch))
        with self.file.open("a", encoding="utf-8") as file:
            print(json.dumps(asdict(sample)), file=file)

    def call(self, work: Callable[[], int]) -> None:
        """Make a call, where `work` returns its number of rows; a call that fails is only counted."""
        self.calls += 1
        try:
            self.rows += work()
        except Exception as error:  # noqa: BLE001 - counted and printed; a run of hours must not end here
            self.failed += 1
            print(f"# call {self.calls} of {self.part!r} failed: {error!r}", file=sys.stderr, flush=True)


def measure(options: Options) -> Iterator[str]:
    """One line for each part of the run; writes the part `Long run` of the results."""
    file = options.samples or Path(tempfile.gettempdir()) / "vllm-tasks-long-run.jsonl"
    try:
        if options.minutes:
            file.write_text("", encoding="utf-8")
            print(f"# samples: {file}", file=sys.stderr, flush=True)
            with (
                tempfile.TemporaryDirectory(prefix="long-") as folder,
                Child(over_table, file, Path(folder) / "table") as table,
                Child(over_engine, file, Path(folder) / "engine", options.minutes) as engine,
                Child(over_bare, file, Path(folder) / "bare") as bare,
            ):
                for part in (table, bare, engine):
                    part.receive()
    finally:
        lines = report(read(file))
    yield from lines


@contextmanager
def begun(pipe: Connection, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A part of the run in this process, with a Prefect server, a folder for temporary files of this process
    and its children, and one for the tables and the model."""
    scratch, work = folder / "tmp", folder / "work"
    for path in (scratch, work):
        path.mkdir(parents=True)
    os.environ.update(ENVIRONMENT, TMPDIR=str(scratch))
    tempfile.tempdir = None  # so that TMPDIR is read again
    pipe.send("begun")
    with prefect_test_harness(server_startup_timeout=600):
        yield scratch, work
    pipe.send("over")


# ---------------------------------------------------------------------- the table


def over_table(pipe: Connection, file: Path, folder: Path) -> None:
    """Process all rows, `ROWS / CALLS` in each call."""
    with begun(pipe, folder) as (scratch, work):
        write_rows(work, ROWS)
        send_all(Record("table", file, scratch), work)
        with Child(over_finished, file, folder / "finished", work) as finished:
            finished.receive()


def over_finished(pipe: Connection, file: Path, folder: Path, work: Path) -> None:
    """Make the calls again, which find all rows of the table in `work` done."""
    with begun(pipe, folder) as (scratch, _):
        send_all(Record("finished", file, scratch), work)


def send_all(record: Record, work: Path) -> None:

    @flow
    def nightly(server: str) -> None:
        from vllm_tasks import predict_in_db

        model, size = model_of(server), ROWS // CALLS
        for _ in range(CALLS):
            record.call(lambda: predict_in_db(model, "text", "rows", db=str(work), limit=size).processed)
            record.look()
        model.close()

    record.look()
    with Child(scripted.serve, kind=scripted.Unruly) as server:
        nightly(server.ready)
    time.sleep(IDLE)
    record.look()


# ---------------------------------------------------------------------- the engine


def over_engine(pipe: Connection, file: Path, folder: Path, minutes: float) -> None:
    """Run one engine after the other until the time is over."""
    with begun(pipe, folder) as (scratch, work):
        write_rows(work, BATCH)
        one_after_the_other(Record("engine", file, scratch), work, minutes)


def one_after_the_other(record: Record, work: Path, minutes: float) -> None:
    from vllm_tasks import VllmModel

    with Child(tiny_model, work / "model") as making:  # in a child, so that torch is not imported here
        name: str = making.ready
    model = VllmModel(identifier="tiny", model_name=name, vllm_kwargs=ENGINE, predict_kwargs=SAMPLING)
    end = time.monotonic() + 60 * minutes
    barren = 0

    @flow
    def shift() -> None:
        with model:
            for number in range(LIFE):
                record.call(lambda n=number: one_call(model, work, record.life, n))  # type: ignore[misc]
                if (number + 1) % LOOK_EVERY == 0:
                    record.look()
                if time.monotonic() > end:
                    return

    record.look()
    try:
        while time.monotonic() < end and barren < FAILED_LIVES:
            record.life += 1
            before = record.rows
            with expected_failures(record):
                shift()
            barren = barren + 1 if record.rows == before else 0
    finally:
        time.sleep(IDLE)
        record.look()


def over_bare(pipe: Connection, file: Path, folder: Path) -> None:
    """Send the rows of one engine's calls through `LLM.generate`, in this process."""
    with begun(pipe, folder) as (scratch, work), Child(tiny_model, work / "model") as making:
        from vllm import LLM, SamplingParams

        llm, sampling = LLM(model=making.ready, **ENGINE), SamplingParams(**SAMPLING)
        record = Record("bare", file, scratch, life=1)
        for number in range(LIFE):
            texts = questions(None, BATCH - 1, seed=number)
            record.call(lambda xs=texts: len(llm.generate(xs, sampling, use_tqdm=False)))  # type: ignore[misc]
            if (number + 1) % LOOK_EVERY == 0:
                record.look()


def tiny_model(pipe: Connection, folder: Path) -> None:
    from tests.tiny_model import make_tiny_model

    pipe.send(str(make_tiny_model(folder)))


@contextmanager
def expected_failures(record: Record) -> Iterator[None]:
    """Count an engine that does not start as a failed call, and let the run continue."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - counted and shown
        record.failed += 1
        print(f"# engine {record.life} failed: {error!r}", file=sys.stderr, flush=True)


def one_call(model: VllmModel, work: Path, life: int, number: int) -> int:
    """Make a call: every tenth is over a table, every tenth a task, the others plain; one row is no
    prompt."""
    from vllm_tasks import predict_batches, predict_in_db

    if number % 10 == 0:
        report = predict_in_db(
            model, "text", "rows", db=str(work), predict_id=f"life_{life}", overwrite=True, max_failed=None
        )
        return report.processed
    xs = [*questions(None, BATCH - 1, seed=number), None]
    call = predict_batches if number % 10 == 5 else type(model).predict_batches
    return len(call(model, xs, on_error="return"))
