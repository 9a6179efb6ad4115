"""`python -m benchmarks.peers`: measure, and write the parts "Peers" of RESULTS.md and their picture."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers import bad_rows, chart, crashes, groups, page, plan
from benchmarks.peers.field import Field
from vllm_tasks.engines.session import permit_amx

permit_amx()  # what vLLM spawns imports this, too

METHOD = """\
Each side is a process of its own with the same model, engine settings, rows and output lengths (greedy, \
end-of-sequence ignored); one is at work at a time, in turn, {rounds} rounds. `start-up` is from the \
start of its process until it took rows, once for a side that stays (Ray Data LLM and run-batch start \
anew for each run: until the first row was sent; lm-evaluation-harness: its imports). Sides that stay, \
but for the older ways, did 32 rows before, which are in no figure; the others begin cold. `work` is from \
the order to the last answer in hand, or in the table or file; `total` is both, for one round. Figures \
are medians; a ratio is the median of the rounds' ratios with the bootstrap's 95 % interval, which of \
three rounds is the least and the greatest (and holds the true median three times in four). `ours ÷ it` \
compares output tokens a second of work; above 1 we are faster, and a side that is ahead of us is in \
**bold**. CPU is that of the side's process and all below it, read from /proc twice a second, in ms a \
row: the client, + vLLM's own engine processes (with the start, where each run has one); a server's are \
not in it. Ray Data LLM and `predict_in_db` go from a Parquet file to files or a table, run-batch from \
file to file; datatrove and curator write files of their own and are, as Ray Data's client, compared with \
`predict_in_db`; lm-evaluation-harness makes its data set and its scores; `vllm bench serve` streams; the \
others go from list to list. The older ways got an eighth of the rows; run-batch, and Ray Data LLM beyond \
`short`, did one round, for their starts take longest. The server of the clients caches no prefixes and \
has at most {concurrency} rows of a client in flight."""


def main() -> None:
    """Measure what was asked for; an interrupt or an order to end closes all children first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results.commit()
    asked = plan.parse(sys.argv[1:])
    with ExitStack() as stack:
        arguments = asked.options.engine_args() if not asked.short else tiny(asked, stack)
        measure(asked, arguments)


def tiny(asked: plan.Plan, stack: ExitStack) -> dict[str, Any]:
    """Engine arguments for the tests' model, in a folder that the stack removes."""
    from benchmarks.options import ENGINE
    from tests.tiny_model import make_tiny_model

    # As in the tests: fewer processes start sooner.
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"})
    folder = asked.options.model
    if folder is None:
        folder = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    return {**ENGINE, "model": str(folder), **asked.options.engine}


def measure(asked: plan.Plan, arguments: dict[str, Any]) -> None:
    """What was made to go wrong, then both groups. The page is written as they go: a run takes an hour."""
    crashed = crashes.table(crashes.observe(asked))
    write_troubles(asked, crashed)
    if not any(map(asked.has_workload, plan.WITH_ENGINES)):
        return
    fields: list[Field] = []
    endings = []

    def write() -> None:
        write_fields(asked, fields)

    with groups.clients_of_one_server(asked, arguments) as clients:
        fields.append(clients)
        endings += groups.measure_clients(clients, write)
    with groups.engines(asked, arguments) as engines:
        fields.insert(0, engines)
        endings = groups.measure_engines(engines, write) + endings
    write_troubles(asked, bad_rows.table(endings), crashed)


def write_fields(asked: plan.Plan, fields: list[Field]) -> None:
    """The part of the page with what was measured so far, and the picture beside it."""
    if any(field.runs for field in fields):
        method = METHOD.format(rounds=asked.rounds, concurrency=asked.options.concurrency)
        parts = [method, page.goals(fields), *map(page.tables, fields)]
        if picture := chart.draw(fields):
            file = asked.output.with_suffix(".svg")
            file.write_text(picture, encoding="utf-8")
            parts.insert(2, f"![Seconds for the short answers, by side]({file.name})")
        record(asked, "Peers", parts)


def write_troubles(asked: plan.Plan, *tables: str) -> None:
    if any(tables):
        record(asked, "Peers when things go wrong", list(tables))


def record(asked: plan.Plan, part: str, texts: list[str]) -> None:
    results.record(part, asked.command, "\n\n".join(filter(None, texts)), page.PACKAGES, asked.output)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
