"""The commands: what they take, what they print, and how they exit."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, validators
from pydantic import ValidationError

from vllm_tasks import VllmAPI, VllmModel
from vllm_tasks._cli import job, project, reference
from vllm_tasks._cli.looks import checked, outputs_of
from vllm_tasks.errors import (
    EngineFailed,
    GateFailed,
    InvalidCall,
    ServerUnavailable,
    TablesUnavailable,
    TooManyFailed,
    VllmTasksError,
)
from vllm_tasks.results import ValidationReport
from vllm_tasks.tables.previews import printable_lines
from vllm_tasks.tasks import passed
from vllm_tasks.validation.sets import ReferenceName

EXITS = {
    InvalidCall: 2,
    ServerUnavailable: 3,
    EngineFailed: 3,
    TablesUnavailable: 3,
    TooManyFailed: 4,
    GateFailed: 5,
}
"""Exit codes, besides 0 for success, 1 for any other error (such as an engine that cannot start) and 130 for
Ctrl-C. 2: correct the call; 3: run it again later; 4: look at failed rows; 5: the model is below its
limits."""

app = App(
    "python -m vllm_tasks", help="vLLM over tables: run jobs, look at results.", version_flags=["--version"]
)
AsJson = Annotated[bool, Parameter("--json", negative=())]
Texts = Annotated[bool, Parameter(negative=())]


@app.command
def run(file: Path, *, json: AsJson = False, texts: Texts = False) -> None:
    """Process the rows of a table and commit one output or one error for each. Run it again to resume.

    Args:
        file: The job: parameters of `batch_predict`, in YAML.
        json: Print the report as JSON.
        texts: Also print the messages of failed rows as JSON; they may hold parts of answers.
    """
    model, arguments = _job_in(file)
    try:
        _print(model.predict_in_db(**arguments), json, texts)
    except TooManyFailed as error:
        _print(error.report, json, texts)
        raise


@app.command
def estimate(file: Path, *, sample: int = 32, json: AsJson = False) -> None:
    """Print how many rows a job would process, and their tokens, time and cost; nothing is committed.

    Args:
        file: The job: parameters of `batch_predict`, in YAML.
        sample: Number of rows that are processed for it.
        json: Print the estimate as JSON.
    """
    given, sampling = _read(file, "estimate")
    for name in ("refresh", "overwrite", "retry_failed", "ids", "limit"):
        if given.get(name) not in (None, False, "missing"):
            raise InvalidCall(
                f"{file} has {name}: {given[name]!r:.100}, and estimate counts the rows without an output or "
                "error: leave it out"
            )
    names = "X", "select", "predict_id", "primary_id", "db", "source", "prices", "context", "sampling_columns"
    taken = {name: given[name] for name in names if name in given}
    _print(given["model"].estimate(**taken, sample=sample, **sampling), json)


@app.command
def preview(file: Path, *, rows: int = 3, json: AsJson = False) -> None:
    """Prompt the model with the first rows of a job and print what comes; nothing is committed.

    Args:
        file: The job: parameters of `batch_predict`, in YAML.
        rows: Number of rows.
        json: Print the rows as JSON.
    """
    given, sampling = _read(file, "preview")
    names = "X", "select", "primary_id", "db", "source", "context", "sampling_columns"
    taken = {name: given[name] for name in names if name in given}
    _print(given["model"].preview(**taken, n=rows, **sampling), json)


@app.command
def validate(
    file: Path | None = None,
    *,
    reference_set: Annotated[ReferenceName | None, Parameter("--set")] = None,
    model: str | None = None,
    url: str | None = None,
    rows: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    db: str | None = None,
    vllm_kwargs: str | None = None,
    json: AsJson = False,
    texts: Texts = False,
) -> None:
    """Score a model on data sets with known answers, and record the values.

    Args:
        file: The job: parameters of `validate_model`, in YAML. Give this, or --set with --model or --url.
        reference_set: A small data set in the package.
        model: With --set: a folder or a name on Hugging Face, or with --url the server's name for the model.
        url: With --set: the address of a vLLM server.
        rows: With --set: number of rows, drawn from the 240 of the set; all of them by default.
        db: With --set: where answers and history go, a path, URL or saved block; by default ./validations.
        vllm_kwargs: With --set and without --url: vLLM's engine arguments, as JSON.
        json: Print the report as JSON.
        texts: Also print the worst and the changed rows as JSON, with their answers, and the history.
    """
    others = {"--model": model, "--url": url, "--rows": rows, "--db": db, "--vllm-kwargs": vllm_kwargs}
    reference.check_either(file, reference_set, others)
    if file is not None:
        report = _validated(file)
    else:
        assert reference_set is not None
        report = reference.validated(reference_set, model, url, rows, db, vllm_kwargs)
    _print(report, json, texts)
    passed(report)


@app.command
def show(predict_id: str, *, db: str, table: str | None = None, json: AsJson = False) -> None:
    """Print how many outputs a job has, and how many errors of which kinds.

    Args:
        predict_id: The name of the outputs; a model's identifier, where the job gives no other.
        db: Where the outputs are: a path, a URL, or a saved block such as `vllm-datalayer/tables`.
        table: The name of the outputs table, if the model gives it one.
        json: Print the counts as JSON.
    """
    _print(outputs_of(predict_id, job.saved("db", db), table), json)


@app.command
def check(file: Path, *, json: AsJson = False) -> None:
    """Find out whether a job can run, without sending a row: its arguments, tables, model and server.

    Args:
        file: The job: parameters of `batch_predict`, in YAML.
        json: Print what was found as JSON.
    """
    _print(checked(*_job_in(file)), json)


@app.command
def init(folder: Path = Path()) -> None:
    """Write a `prefect.yaml`, a flow of your own and a README into an empty folder.

    Args:
        folder: The folder; it is created unless it exists.
    """
    written = project.write(folder)
    print(*(f"wrote {file}" for file in written), f"next: {folder / 'README.md'}", sep="\n")


@app.command
def pools(*words: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Make the work pools of the Prefect server, or bring them up to date; see `pools -- --help`."""
    from vllm_tasks.pools.__main__ import main

    main(list(words))


def _validated(file: Path) -> ValidationReport:
    """The report of the validation that a job file describes."""
    from vllm_tasks.flows.validate_model import validate_model

    given = job.read(file, validate_model)
    model = given.pop("model")
    given.pop("approval_timeout", None)
    job.check_runs_here(file, model, asks=given.pop("on_gate_failed", "fail") == "ask")
    report: ValidationReport = model.validate(given.pop("validation", None), **given)
    return report


def _job_in(file: Path) -> tuple[VllmAPI | VllmModel, dict[str, Any]]:
    """The model of a job file, and the arguments of its `predict_in_db`."""
    given, sampling = _read(file, "predict_in_db")
    model = given.pop("model")
    job.check_runs_here(file, model, given.get("shards", 1))
    return model, given | sampling


def _read(file: Path, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a job file, and its sampling parameters, for this method of its model."""
    from vllm_tasks.flows.batch_predict import batch_predict

    given = job.read(file, batch_predict)
    sampling = given.pop("sampling", None) or {}
    job.check_sampling(file, sampling, getattr(given["model"], method))
    return given, sampling


def _print(found: Any, as_json: bool, texts: bool = True) -> None:
    """Print a result for people, or for programs. If nobody reads it any more, the work is done anyway."""
    text = json.dumps(_fields(found, texts), default=str) if as_json else printable_lines(str(found))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end


def _fields(found: Any, texts: bool) -> Any:
    """A result as JSON; without `texts`, it lacks the fields that its repr lacks: they have rows' texts.

    JSON has no nan and no infinity, so a number that is not known is null.
    """
    if dataclasses.is_dataclass(found):
        shown = [field.name for field in dataclasses.fields(found) if field.repr or texts]
        return {name: _fields(getattr(found, name), texts) for name in shown}
    if isinstance(found, dict):
        return {str(key): _fields(value, texts) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_fields(each, texts) for each in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def main(arguments: list[str] | None = None, exits: Callable[[int], Any] = sys.exit) -> None:
    """Run a command; an error of the package becomes one line and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may have characters that the terminal lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        app(arguments, exit_on_error=False)
    except CycloptsError:  # it is printed
        exits(EXITS[InvalidCall])
    except ValidationError as error:  # of a model or datalayer that options describe
        print(f"error: {printable_lines(job.wrong_in(error))}", file=sys.stderr)
        exits(EXITS[InvalidCall])
    except VllmTasksError as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        lasts = isinstance(error, EngineFailed) and not error.temporary
        exits(1 if lasts else next((code for kind, code in EXITS.items() if isinstance(error, kind)), 1))
