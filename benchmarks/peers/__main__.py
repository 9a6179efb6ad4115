"""`python -m benchmarks.peers`: measures, and writes the parts "Peers" of RESULTS.md and their picture."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers import bad_rows, chart, crashes, groups, page
from benchmarks.peers.bad_rows import Ending
from benchmarks.peers.field import Field
from benchmarks.peers.plan import Plan, parse
from vllm_tasks.engines.session import permit_amx

permit_amx()  # the processes that vLLM spawns import this module, too

Opened = Callable[[Plan, dict[str, Any]], AbstractContextManager[Field]]
Measured = Callable[[Field, Callable[[], None]], list[Ending]]

METHOD = """\
Each side is a process of its own with the same model, engine settings, rows and output lengths (greedy, \
end-of-sequence ignored). The sides work one at a time, in turn, for {rounds} rounds. `start-up` is the \
time from the start of a side's process until it accepts rows, once for a resident side. For Ray Data LLM \
and run-batch, which start an engine or a client for each run, it is the time until the first row is sent; \
for lm-evaluation-harness it is the time of its imports. Resident sides, except the older ways, process 32 \
rows first, which do not count; the others begin cold. `work` is the time from the order until the last \
answer is received, or is in the table or file; `total` is the sum of both, for one round. Figures are \
medians. A ratio is the median of the rounds' ratios, with the bootstrap's 95 % interval; with three \
rounds, this interval is the least and the greatest ratio (and contains the true median three times in \
four). `ours ÷ it` compares output tokens a second of work: above 1 we are faster, and a side that is \
faster than ours, at work or in total, is in **bold**. CPU is that of the side's process and its \
descendants, read from /proc twice a second, in ms a row: the client, + vLLM's own engine processes \
(including the start, if each run has one). The CPU of a server is not included. Ray Data LLM and \
`predict_in_db` go from a Parquet file to files or a table, and run-batch from file to file. datatrove and \
curator write files of their own; they, and Ray Data's client, are compared with `predict_in_db`. \
lm-evaluation-harness also builds its data set and its scores, `vllm bench serve` streams, and the others \
go from list to list. The older ways got an eighth of the rows. The model of vectors and scores is the same, \
used for its last hidden states; Ray Data LLM got no pairs. run-batch, and Ray Data LLM on workloads other \
than `short`, ran one round, since their starts take longest. The server of the clients does not cache \
prefixes, and each client has at most {concurrency} rows in flight, but for Daft, which sends all rows at \
once and has no option for it."""


def main() -> None:
    """Run the requested sides and workloads; SIGINT and SIGTERM close all child processes first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results.commit()
    plan = parse(sys.argv[1:])
    with ExitStack() as stack:
        arguments = plan.options.engine_args() if not plan.short else tiny(plan, stack)
        measure(plan, arguments)


def tiny(plan: Plan, stack: ExitStack) -> dict[str, Any]:
    """Engine arguments for the model of the tests, in a folder that the stack removes."""
    from benchmarks.options import ENGINE
    from tests.tiny_model import make_tiny_model

    # As in the tests, since fewer processes start sooner.
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"})
    folder = plan.options.model
    if folder is None:
        folder = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    return {**ENGINE, "model": str(folder), **plan.options.engine}


WITH_ENGINES: dict[str, tuple[Opened, Measured]] = {
    "clients": (groups.clients_of_one_server, groups.measure_clients),
    "engines": (groups.engines, groups.measure_engines),
    "rows": (partial(groups.engines, title=groups.DIFFERENT), groups.measure_rows),
    "pooling": (groups.pooling, groups.measure_pooling),
}


def measure(plan: Plan, arguments: dict[str, Any]) -> None:
    """Measure the crashes, then each group. Each writes a part of the page, also while it runs: all of them
    take an hour and a half."""
    if plan.has_group("crash") and (crashed := crashes.table(crashes.observe(plan))):
        record(plan, "Peers after a crash", [crashed])
    for name, (opened, measured) in WITH_ENGINES.items():
        if plan.has_group(name):
            with opened(plan, arguments) as field:
                write(plan, field, measured(field, partial(write, plan, field)))


def write(plan: Plan, field: Field, endings: Sequence[Ending] = ()) -> None:
    """Write what a group has measured so far to its part of the page, and the picture of all groups."""
    if not field.runs and not endings:
        return
    record(plan, field.title, [page.goals(field), page.tables(field), bad_rows.table(endings)])
    parts = [METHOD.format(rounds=plan.rounds, concurrency=plan.options.concurrency)]
    if picture := chart.draw(results.read(plan.output)):
        file = plan.output.with_suffix(".svg")
        file.write_text(picture, encoding="utf-8")
        parts.append(f"![Seconds for the short answers, by side]({file.name})")
    record(plan, "Peers", parts)


def record(plan: Plan, part: str, texts: list[str]) -> None:
    results.record(part, plan.command, "\n\n".join(filter(None, texts)), page.PACKAGES, plan.output)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
