"""SCALE: what limits many shards that commit into one lake, measured on this machine and then simulated.

Measured: the parts of a commit, by the rows of its group, the files of the table, the commits of others and
the known keys; commits a second of up to 16 writers at once; the search for the missing rows. The parts are
the costs of a simulation of `ROWS` rows by many shards, each on a machine of its own. Before that, the
simulation repeats what several writers did on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks import results
from benchmarks.options import Options
from benchmarks.scale import commits, missing
from benchmarks.scale.commits import GROUPS, Contended, Sample
from benchmarks.scale.missing import Found
from benchmarks.scale.page import LEAST, by_case, drawn, efficiency, ms, page
from benchmarks.scale.simulation import Costs, Ran, Setting, contend, ran

WRITERS = 1, 2, 4, 8, 16
GROWING = 1000
"""Commits into a table that begins empty."""
KEYS = 1_000_000, 10_000_000
"""Rows among which missing ones are searched."""
ROWS = 100_000_000
RATES = 50.0, 500.0
"""Rows a second of an engine: 200 tokens a row at 10,000 tokens/s, and short answers."""
SHARDS = tuple(2**i for i in range(2, 12))
IMAGES = Path(__file__).parents[2] / "docs" / "images"


def measure(options: Options) -> Iterator[str]:
    """The lines of each part; the part "Scale" of the page, and the pictures of the documentation.

    `--rows` above ten million adds a search among so many keys.
    """
    samples = commits.parts()
    yield from map(line_of_parts, by_case(samples))
    grown = commits.growing(GROUPS[0], GROWING)
    yield line_of_growth(grown)
    costs, together = Costs.fitted(samples), list[tuple[Contended, Ran]]()
    for found in commits.contended(WRITERS, (GROUPS[0], GROUPS[-1])):
        simulated = contend(found.writers, found.group, found.seconds, costs, os.cpu_count() or 1)
        together.append((found, simulated))
        yield line_of_contended(found, simulated)
    more = (options.rows,) if options.rows > max(KEYS) else ()
    searched = [found for keys in (*KEYS, *more) for found in missing.searches(keys)]
    yield from map(line_of_search, searched)
    runs: dict[Setting, Ran] = {}
    for series in settings():
        for setting in series:
            runs[setting] = ran(setting, costs)
            yield line_of_run(setting, runs[setting])
            if efficiency(setting, runs[setting]) < LEAST:
                break
    for name, picture in drawn(samples, together, searched, runs):
        (IMAGES / name).write_text(picture, encoding="utf-8")
    written = page(samples, grown, together, searched, runs)
    results.record("Scale", "make bench-SCALE", written, ("deltalake", "duckdb", "pyarrow"))


def settings() -> Iterator[list[Setting]]:
    """The runs to simulate, by series: numbers of shards that differ in nothing else."""
    for per_shard in (True, False):
        for rate in RATES:
            for rows in GROUPS:
                yield [Setting(n, rate, rows, ROWS // 2, 1 / n if per_shard else 1.0) for n in SHARDS]


def line_of_parts(same: Sequence[Sample]) -> str:
    one = same[0]
    parts = ", ".join(f"{part} {ms(median(s.seconds.get(part, 0.0) for s in same))}" for part in one.seconds)
    return (
        f"SCALE {ms(median(s.total for s in same))} ms a commit of {one.rows} rows into {one.files:,} files, "
        f"{one.behind} commits of others, {one.known:,} known keys: {parts}; "
        f"median of {len(same)}"
    )


def line_of_growth(grown: Sequence[float]) -> str:
    return (
        f"SCALE {ms(median(grown[-100:]))} ms a commit of {GROUPS[0]} rows after {len(grown):,} commits, "
        f"{ms(median(grown[10:110]))} after 10 (medians of 100); all {sum(grown):.0f} s, slowest "
        f"{max(grown):.2f} s"
    )


def line_of_contended(found: Contended, simulated: Ran) -> str:
    return (
        f"SCALE {found.rate:.1f} commits a second of {found.group} rows by {found.writers} writers into one "
        f"lake, {found.attempts / found.commits:.1f} attempts each, slowest {found.slowest:.2f} s (median of "
        f"writers), {found.cpu / found.seconds:.2f} cores, {found.wasted:.2f} of the table's bytes wasted; "
        f"simulated {simulated.commits / simulated.seconds:.1f}, "
        f"{simulated.attempts / simulated.commits:.1f} attempts"
    )


def line_of_search(found: Found) -> str:
    which = "all rows" if found.shard is None else f"a shard of {found.shard[1]}"
    return (
        f"SCALE {found.first:.1f} s to the first missing row of {which} among {found.keys:,} keys, "
        f"{found.last:.1f} s to the last of {found.rows:,}; peak RSS {found.peak / 2**20:.0f} MiB"
    )


def line_of_run(setting: Setting, run: Ran) -> str:
    kept = "all" if setting.known == 1.0 else "its own"
    return (
        f"SCALE {efficiency(setting, run):.3f} efficiency, simulated, of {setting.shards} shards of "
        f"{setting.rate:g} rows/s with groups of {setting.commit_rows}, each with {kept} keys: "
        f"{run.rate:,.0f} rows/s, {run.attempts / run.commits:.1f} attempts a commit, slowest "
        f"{run.slowest:.1f} s, {run.failed} failed"
    )
