"""GATE: how often `max_regression` stops a model that did not change, and one that got worse.

This is a simulation with the code of a validation. Each row's probability of being right is drawn from a Beta
distribution (most rows are nearly always right or nearly always wrong), and each row is answered twice.
`sampled` draws both answers independently, as with a temperature. `greedy` redraws 1 % of the rows and
repeats the others, as live greedy decoding does (99.0 to 99.6 % agree). A drop of d points makes right rows
wrong, d of 100 rows in expectation. Limits are 0 unless a line names one. A figure is the fraction of the
runs (or of weeks of runs) that the gate stops. Goal: <= 0.05 where nothing changed, which a figure of so many
runs may miss by chance. Lines without a mark are other methods, or models that got worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from benchmarks import results
from benchmarks.options import Options
from vllm_tasks.validation.gate import corrected
from vllm_tasks.validation.history import baselines
from vllm_tasks.validation.intervals import wilson
from vllm_tasks.validation.report import Record
from vllm_tasks.validation.statistics import ALPHA, Sides, familywise, mean_rows, paired, regressed

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator], Sides]
"""Draws two runs."""

PART = "Gate"
SIZES = {1319: 300, 300: 400, 100: 400}
"""Number of rows (GSM8K's test set first), and number of comparisons of two runs of one model."""
MEANS = (0.1, 0.4, 0.8)
SPREAD = 2.0
"""a + b of the Beta distribution of the rows' probabilities."""
REDRAWN = {"sampled": 1.0, "greedy": 0.01}
"""The fraction of rows that a second run draws again."""
DROPS = (0.05, 0.02)
POWER = 150
GOAL = 0.05
TIMES = 400
MANY = 1600
"""Comparisons of many limits, and of clusters, where the goal is close."""
FAMILIES = (1, 6, 12)
"""Numbers of limits over the same rows."""
CHAINS, RUNS = 100, 25
WEEKS, NIGHTS = 30, 15
"""Drifts, and the runs of each."""
UNCHANGED = "nothing changed"
OTHER_METHODS = ", each on its own", ", by Holm's method", ", row by row", ", without "
"""What the gate does not do, for comparison."""


@dataclass(frozen=True)
class Accuracy:
    """Two runs with scores of 0 and 1; the mean falls by `drop` in expectation."""

    n: int
    right: float
    noise: str
    drop: float = 0.0

    def __call__(self, rng: np.random.Generator) -> Sides:
        chances = rng.beta(SPREAD * self.right, SPREAD * (1 - self.right), self.n)
        before = rng.random(self.n) < chances
        redrawn = rng.random(self.n) < REDRAWN[self.noise]
        after = np.where(redrawn, rng.random(self.n) < chances, before)
        broken = rng.random(self.n) < self.drop / self.right
        return sides(before, after & ~broken)


def sides(before: NDArray[np.bool_] | Array, after: NDArray[np.bool_] | Array) -> Sides:
    old, new = (mean_rows(side.astype(np.float64).tolist()) for side in (before, after))
    return Sides(old, new, bounds=(0.0, 1.0))


def f1(rng: np.random.Generator, n: int = 300) -> Sides:
    """Token F1: most answers are close to the row's quality; one in five is completely wrong or right."""
    quality = rng.beta(1.5, 1.5, n)
    before, after = (
        np.where(rng.random(n) < 0.2, rng.random(n) < quality, rng.beta(4 * quality, 4 - 4 * quality))
        for _ in range(2)
    )
    return sides(before, after)


def bleu_of_runs(rng: np.random.Generator, n: int = 300) -> Sides:
    """Corpus BLEU from matches and numbers of n-grams up to 4, which match at random, and both lengths."""
    quality, reference = rng.beta(6, 3, n), rng.integers(8, 40, n)

    def run() -> Array:
        length = np.maximum(4, reference + rng.integers(-4, 5, n))
        grams = np.stack([length - k for k in range(4)])
        matches = [rng.binomial(grams[k], quality ** (k + 1)) for k in range(4)]
        return np.stack([*matches, *grams, reference], axis=1).astype(np.float64)

    return Sides(run(), run(), bleu, bounds=(0.0, 1.0))


def bleu(sums: Sequence[float]) -> float:
    if not all(sums[:4]):
        return 0.0
    precision = math.exp(sum(math.log(sums[k] / sums[4 + k]) for k in range(4)) / 4)
    return precision * min(1.0, math.exp(1 - sums[8] / sums[4]))


def measure(options: Options) -> Iterator[str]:
    """One line for each kind of comparison, and a table of RESULTS.md: the fraction that is stopped."""
    del options  # this needs no data, no model and no engine
    found = []
    for what, stopped in figures():
        interval = wilson(sum(stopped), len(stopped))
        share = sum(stopped) / len(stopped)
        shown = f"{interval.low:.3f} to {interval.high:.3f}"
        found.append((what, f"{share:.3f}", shown, mark(what, share, interval.low)))
        yield f"GATE {share:.3f} {what} [{interval.low:.3f} {interval.high:.3f}]"
    table = results.table(("runs", "stopped", "95 % interval", "goal"), found)
    results.record(PART, "make bench-GATE", f"{__doc__.split(chr(10) * 2)[1]}\n\n{table}", ("numpy",))


def mark(what: str, share: float, low: float) -> str:
    """Whether a line meets the goal; the `low` end of its interval tells whether a miss may be chance."""
    if not what.startswith(UNCHANGED) or any(other in what for other in OTHER_METHODS):
        return ""
    return "met" if share <= GOAL else "met, within chance" if low <= GOAL else "**not met**"


def figures() -> Iterator[tuple[str, Sequence[bool]]]:
    """What was compared, and whether the gate stopped it, each time."""
    for n, times in SIZES.items():
        for noise in REDRAWN:
            for right in MEANS if noise == "sampled" else MEANS[1:2]:
                what = f"{UNCHANGED}, {noise}, n={n}, {right:.0%} right"
                yield what, stops(Accuracy(n, right, noise), times)
    yield f"{UNCHANGED}, token F1, n=300", stops(f1, TIMES)
    yield f"{UNCHANGED}, BLEU, n=300", stops(bleu_of_runs, TIMES // 2)
    yield (
        f"{UNCHANGED}, sampled, n=1319, 40% right, by a drop of 0.01 alone, without a test",
        [difference(one) < -0.01 for one in drawn(Accuracy(1319, 0.4, "sampled"), TIMES)],
    )
    yield from of_families()
    yield from of_clusters()
    yield from of_chains()
    yield from of_drifts()
    for n in SIZES:
        for noise in REDRAWN:
            for drop in DROPS:
                what = f"{100 * drop:.0f} points worse, {noise}, n={n}, 40% right"
                yield what, stops(Accuracy(n, 0.4, noise, drop), POWER)


def drawn(draw: Draw, times: int) -> Iterator[Sides]:
    rng = np.random.default_rng(0)
    return (draw(rng) for _ in range(times))


def difference(runs: Sides) -> float:
    before, after = runs.values()
    return after - before


def stops(draw: Draw, times: int, limit: float = 0.0) -> list[bool]:
    return [regressed(paired(runs), limit) for runs in drawn(draw, times)]


# ---------------------------------------------------------------------- many limits


def family(rng: np.random.Generator, metrics: int, drop: float, n: int = 300) -> list[Sides]:
    """Metrics over the same rows, which agree in 80 of 100 rows, as exact match, contains and F1 do."""

    def run(lost: float) -> list[NDArray[np.bool_]]:
        right = (rng.random(n) < chances) & (rng.random(n) >= lost / 0.6)
        return [np.where(rng.random(n) < 0.2, rng.random(n) < chances, right) for _ in range(metrics)]

    chances = rng.beta(SPREAD * 0.6, SPREAD * 0.4, n)
    return [sides(before, after) for before, after in zip(run(0.0), run(drop), strict=True)]


def of_families() -> Iterator[tuple[str, Sequence[bool]]]:
    """The gate's test of all limits at once, beside each limit on its own and Holm's method. The verdicts of
    Holm's and of Bonferroni's method are equal: one limit fails if the least p is at most 0.05 / limits."""
    for drop, words in (0.0, UNCHANGED), (0.08, "8 points worse"):
        for metrics in FAMILIES:
            rng = np.random.default_rng(0)
            runs = [family(rng, metrics, drop) for _ in range(MANY if not drop else POWER)]
            least = [min(paired(one).p_worse for one in each) for each in runs]
            joint = [min(familywise(each)) <= ALPHA for each in runs]
            what = f"{words}, n=300, {metrics} limit{'s' * (metrics > 1)}"
            yield what, joint
            if metrics > 1:
                yield f"{what}, each on its own", [p <= ALPHA for p in least]
                yield f"{what}, by Holm's method", [p <= ALPHA / metrics for p in least]


# ---------------------------------------------------------------------- clusters


def of_clusters() -> Iterator[tuple[str, Sequence[bool]]]:
    """60 passages with 5 questions each, which are right or wrong together in one run."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 5).tolist()
    runs = []
    for _ in range(MANY):
        chances = rng.beta(1.0, 1.0, 60)
        runs.append(sides(*(np.repeat(rng.random(60) < chances, 5) for _ in range(2))))
    what = f"{UNCHANGED}, 60 passages with 5 questions each"
    yield f"{what}, by cluster", [familywise([one], clusters)[0] <= ALPHA for one in runs]
    yield f"{what}, row by row", [familywise([one])[0] <= ALPHA for one in runs]


# ---------------------------------------------------------------------- chains of runs

FIRST = Record(
    run="0",
    metric="m",
    answers="0",
    model="",
    dataset="",
    dataset_hash="",
    dataset_table="",
    outputs="",
    fingerprint="",
    value=0.0,
    low=0.0,
    high=0.0,
    n=0,
    failed=0,
    truncated=0,
    on_error="miss",
    higher_is_better=True,
    passed=True,
    reason=None,
    compared_with=None,
    uuid="",
    flow_run=None,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)


def chain(
    rng: np.random.Generator,
    runs: int,
    baseline: str,
    *,
    threshold: float = 0.0,
    night: float = 0.0,
    limit: float = 0.0,
    noise: str = "sampled",
    correct: bool = True,
) -> Iterator[bool]:
    """Whether the gate stops each run of one model of GSM8K's size that gets worse by `night` in each."""
    n = max(SIZES)
    chances = rng.beta(SPREAD * 0.4, SPREAD * 0.6, n)
    chances *= 0.4 / chances.mean()
    scores = rng.random(n) < chances
    said: dict[str, NDArray[np.bool_]] = {}
    records: list[Record] = []
    for i in range(runs):
        chances = chances * (1 - night / 0.4)
        redrawn = rng.random(n) < REDRAWN[noise]
        scores = np.where(redrawn, rng.random(n) < chances, scores & (rng.random(n) >= night / 0.4))
        two = baseline == "best" and sum(record.passed for record in records) > 1
        worse = False
        for one in (chosen := baselines(records, baseline, threshold or None)):
            found = paired(sides(said[one.record.run], scores))
            p = corrected(found.p_worse, one, 2 if two else len(chosen), 1) if correct else found.p_worse
            worse |= regressed(found, limit, p_worse=p)
        if chosen:
            yield worse
        passed = not worse and bool(scores.mean() >= threshold)
        at = FIRST.created_at + timedelta(days=i)
        value = wilson(int(scores.sum()), n)
        record = replace(FIRST, run=str(i), low=value.low, high=value.high, passed=passed, created_at=at)
        records.append(replace(record, value=float(scores.mean())))
        said[str(i)] = scores


def chained(chains: int, runs: int, baseline: str, **options: float | str | bool) -> list[list[bool]]:
    return [
        list(chain(np.random.default_rng(seed), runs, baseline, **options))  # type: ignore[arg-type]
        for seed in range(chains)
    ]


def of_chains() -> Iterator[tuple[str, Sequence[bool]]]:
    """Runs of a model that does not change, each compared with baselines that chance helped to choose."""
    for baseline in "last", "best":
        for threshold, words in (0.0, ""), (0.4, ", half of them below a threshold"):
            what = f"{UNCHANGED}, {RUNS} runs of n=1319, baseline {baseline}{words}"
            corrections = {True: ""} | ({False: ", without the correction for choice"} if threshold else {})
            for correct, how in corrections.items():
                found = chained(CHAINS, RUNS, baseline, threshold=threshold, correct=correct)
                yield what + how, [one for each in found for one in each]


def of_drifts() -> Iterator[tuple[str, Sequence[bool]]]:
    """Weeks in which a model loses half a point each night: whether any of the nights is stopped."""
    for noise in REDRAWN:
        for baseline in "last", "best":
            what = f"0.5 points worse each of {NIGHTS} nights, {noise}, limit 0.02, baseline {baseline}"
            found = chained(WEEKS, NIGHTS, baseline, night=0.005, limit=0.02, noise=noise)
            yield what, [any(each) for each in found]
