"""The part "Scale" of RESULTS.md, and the pictures of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median

from benchmarks import results
from benchmarks.scale import pictures
from benchmarks.scale.commits import GROUPS, SECONDS, Contended, Sample
from benchmarks.scale.missing import Found
from benchmarks.scale.pictures import Curve
from benchmarks.scale.simulation import SPAN, WARM, Ran, Setting

EFFICIENT, LEAST = 0.9, 0.6
Together = Sequence[tuple[Contended, Ran]]
"""What several writers did, measured and simulated."""
Runs = Mapping[Setting, Ran]


TEXT = """\
Rows are scripted: a whole number as the key, an answer of 130 random words (about 200 tokens, 300 bytes in
Parquet) and the other columns of an outputs table. The lake is a folder on this machine's disk. Figures are
medians.

### The parts of a commit, measured

Milliseconds of one writer's commit. *Files* of the table; *others*: commits of others since its last one;
*known*: keys that others have written since it began. *Log* reads the log and the keys of others, *join*
looks for its own among them, *write* writes the file and the entry of the log, *rest* makes the rows and
their Arrow columns. Another commit during *log*, *join* or *write* makes the attempt fail.

{parts}

A table that begins empty, {commits:,} commits of {group} rows one after another: {first} ms for the first
hundred, {last} ms for the last; the slowest, with a compaction, took {slowest:.2f} s.

### Several writers at once, measured and simulated

Processes that commit groups one after another for {seconds:g} s, on this machine's cores, in all. *Attempts*
and *wasted* are for each commit: *wasted* are the bytes of files that a lost attempt has left, divided by
those of the table. The simulation has the costs above and the same cores.

{together}

### The search for missing rows, measured

The first nine tenths of the rows are done. *First*: seconds to the first missing row; *last*: to the last
one, without an engine.

{searched}

### Shards of one table, simulated

Shards on a machine each, with engines of a constant rate, in a table that has {there:g} M rows: half of a run
over 100 M. Rows/s are those that are committed within {span:g} s, after {warm:g} s. *Keys*: what a writer
remembers of others' rows, the keys of its *shard* (as the package does) or *all* (as it did before).
*Fails*: a commit has lost 100 attempts five times. A series ends below an efficiency of {least}.

{runs}

The knee is the most shards with an efficiency of {efficient} and without a failure.

{knees}
"""


def page(
    samples: Sequence[Sample],
    grown: Sequence[float],
    together: Together,
    searched: Sequence[Found],
    runs: Runs,
) -> str:
    """The part of the page, as Markdown."""
    parts = ("rows", "files", "others", "known", "log", "join", "write", "rest", "commit")
    writers = ("writers", "rows", "commits/s", "rows/s", "simulated", "attempts", "simulated", "slowest, s")
    search = ("keys", "rows of", "first, s", "last, s", "peak MiB")
    shards = ("keys", "rows/s each", "rows of a group", "shards", "rows/s", "efficiency", "attempts")
    return TEXT.format(
        parts=results.table(parts, [parts_row(same) for same in by_case(samples)]),
        commits=len(grown),
        group=GROUPS[0],
        first=ms(median(grown[10:110])),
        last=ms(median(grown[-100:])),
        slowest=max(grown),
        seconds=SECONDS,
        together=results.table((*writers, "wasted"), [together_row(*pair) for pair in together]),
        searched=results.table(search, [search_row(found) for found in searched]),
        there=next(iter(runs)).there / 1_000_000,
        span=SPAN,
        warm=WARM,
        least=LEAST,
        efficient=EFFICIENT,
        runs=results.table((*shards, "slowest, s"), [run_row(*item) for item in runs.items()]),
        knees=results.table((*shards[:3], "knee: shards", "rows/s"), knees(runs)),
    )


def by_case(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that differ in their times alone."""

    def case(sample: Sample) -> tuple[int, ...]:
        return sample.files, sample.behind, sample.known, sample.rows

    return [list(same) for _, same in groupby(samples, case)]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def parts_row(same: Sequence[Sample]) -> list[str]:
    one = same[0]
    parts = [ms(median(s.seconds.get(part, 0.0) for s in same)) for part in ("log", "join", "write", "rest")]
    given = [f"{number:,}" for number in (one.rows, one.files, one.behind, one.known)]
    return [*given, *parts, ms(median(s.total for s in same))]


def together_row(found: Contended, simulated: Ran) -> list[str]:
    return [
        f"{found.writers}",
        f"{found.group:,}",
        f"{found.rate:.1f}",
        f"{found.rate * found.group:,.0f}",
        f"{simulated.commits / simulated.seconds:.1f}",
        f"{found.attempts / found.commits:.1f}",
        f"{simulated.attempts / simulated.commits:.1f}",
        f"{found.slowest:.2f}",
        f"{found.wasted:.2f}",
    ]


def search_row(found: Found) -> list[str]:
    which = "the table" if found.shard is None else f"a shard of {found.shard[1]}"
    figures = f"{found.first:.1f}", f"{found.last:.1f}", f"{found.peak / 2**20:.0f}"
    return [f"{found.keys:,}", which, *figures]


def efficiency(setting: Setting, run: Ran) -> float:
    """The rate, divided by what the engines could do."""
    return run.rate / (setting.shards * setting.rate)


def series(setting: Setting) -> list[str]:
    """What settings of one series have in common."""
    kept = "all" if setting.known == 1.0 else "shard"
    return [kept, f"{setting.rate:g}", f"{setting.commit_rows:,}"]


def run_row(setting: Setting, run: Ran) -> list[str]:
    return [
        *series(setting),
        f"{setting.shards:,}",
        f"{run.rate:,.0f}",
        f"{efficiency(setting, run):.2f}" + (" fails" if run.failed else ""),
        f"{run.attempts / run.commits:.1f}",
        f"{run.slowest:.0f}",
    ]


def knees(runs: Runs) -> list[list[str]]:
    """For each series, the most shards up to which all runs are efficient."""
    found = []
    for common, same in groupby(runs.items(), lambda item: series(item[0])):
        best: tuple[Setting, Ran] | None = None
        for setting, run in same:
            if efficiency(setting, run) < EFFICIENT or run.failed:
                break
            best = setting, run
        found.append([*common, *((f"{best[0].shards:,}", f"{best[1].rate:,.0f}") if best else ("none", ""))])
    return found


def drawn(
    samples: Sequence[Sample], together: Together, searched: Sequence[Found], runs: Runs
) -> Iterator[tuple[str, str]]:
    """The pictures by the names of their files."""
    yield "scale-commit.svg", pictures.draw(
        "Milliseconds of a commit, as its table grows",
        "measured, one writer; 100 M rows are about 8,000 files",
        "files of the table", "ms", commit_curves(samples),
    )  # fmt: skip
    yield "scale-writers.svg", pictures.draw(
        "Rows a second of several writers into one lake",
        "measured: processes on 2 cores that commit one group after another",
        "writers", "rows/s", writer_curves(together),
    )  # fmt: skip
    yield "scale-missing.svg", pictures.draw(
        "Seconds to the first missing row",
        "measured; the first nine tenths of the table are done",
        "rows of the table", "s", search_curves(searched),
    )  # fmt: skip
    yield "scale-shards.svg", pictures.draw(
        "Rows a second of all shards into one lake",
        "simulated from measured costs, at half of 100 M rows; engines of 50 rows/s",
        "shards", "rows/s", run_curves(runs),
    )  # fmt: skip


def commit_curves(samples: Sequence[Sample]) -> dict[str, Curve]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for same in by_case(samples):
        one = same[0]
        if one.known or one.behind > 8:
            continue
        name = f"{one.rows:,} rows" + (f", {one.behind} behind" if one.behind else "")
        curves.setdefault(name, []).append((max(one.files, 1), 1000 * median(s.total for s in same)))
    return dict(curves)


def writer_curves(together: Together) -> dict[str, Curve]:
    return {
        f"groups of {group:,}": [
            (float(found.writers), found.rate * group) for found, _ in together if found.group == group
        ]
        for group in sorted({found.group for found, _ in together})
    }


def search_curves(searched: Sequence[Found]) -> dict[str, Curve]:
    return {
        name: [(float(found.keys), found.first) for found in searched if (found.shard is None) == whole]
        for name, whole in (("the whole table", True), ("a shard of 16", False))
    }


def run_curves(runs: Runs) -> dict[str, Curve]:
    """Engines of the first rate; the smallest and the largest groups, and the same as it was before."""
    rate = next(iter(runs)).rate
    named: dict[str, Curve] = {}
    for (kept, *_, rows), same in groupby(
        ((s, r) for s, r in runs.items() if s.rate == rate), lambda item: series(item[0])
    ):
        if int(rows.replace(",", "")) in (GROUPS[0], GROUPS[-1]):
            name = f"{rows}, before" if kept == "all" else f"groups of {rows}"
            named[name] = [(float(setting.shards), run.rate) for setting, run in same]
    return named
