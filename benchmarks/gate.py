"""GATE: how often `max_regression` stops a model that did not change, and one that got worse.

This is a simulation with the code of a validation. Each row's probability of being right is drawn from a Beta
distribution (most rows are nearly always right or nearly always wrong), and each row is answered twice.
`sampled` draws both answers independently, as with a temperature. `greedy` redraws 1 % of the rows and
repeats the others, as live greedy decoding does (99.0 to 99.6 % agree). A drop of d points makes right rows
wrong, d of 100 rows in expectation. Two lines are for chains of runs of one model, each compared with the
last run that passed, which was selected by luck. Goal: <= 5 % alarms where nothing changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.options import Options
from vllm_tasks.validation.resampling import mean
from vllm_tasks.validation.intervals import wilson
from vllm_tasks.validation.statistics import Paired, paired, regressed

Array = NDArray[np.float64]
Compared = Callable[[np.random.Generator], Paired]
"""Draws two runs and compares them."""

LIMITS = (0.0, 0.01, 0.02)
SIZES = {1319: 2_000, 300: 600, 100: 600}
"""Number of rows (GSM8K's test set first), and number of comparisons of two runs of one model."""
MEANS = (0.1, 0.4, 0.8)
SPREAD = 2.0
"""a + b of the Beta distribution of the rows' probabilities."""
REDRAWN = {"sampled": 1.0, "greedy": 0.01}
"""The fraction of rows that a second run draws again."""
DROPS = (0.05, 0.03, 0.02)
POWER = 300
CONTINUOUS = 500
CHAINS, RUNS = 40, 25


@dataclass(frozen=True)
class Accuracy:
    """Two runs with scores of 0 and 1; the mean falls by `drop` in expectation."""

    n: int
    right: float
    noise: str
    drop: float = 0.0

    def __call__(self, rng: np.random.Generator) -> Paired:
        chances = rng.beta(SPREAD * self.right, SPREAD * (1 - self.right), self.n)
        before = rng.random(self.n) < chances
        redrawn = rng.random(self.n) < REDRAWN[self.noise]
        after = np.where(redrawn, rng.random(self.n) < chances, before)
        broken = rng.random(self.n) < self.drop / self.right
        return paired(of_mean(before), of_mean(after & ~broken), mean)


def of_mean(scores: NDArray[np.bool_] | Array) -> Array:
    return np.stack([scores, np.ones(len(scores))], axis=1).astype(np.float64)


def f1(rng: np.random.Generator, n: int = 300) -> Paired:
    """Token F1: most answers are close to the row's quality; one in five is completely wrong or right."""
    quality = rng.beta(1.5, 1.5, n)
    before, after = (
        np.where(rng.random(n) < 0.2, rng.random(n) < quality, rng.beta(4 * quality, 4 - 4 * quality))
        for _ in range(2)
    )
    return paired(of_mean(before), of_mean(after), mean)


def bleu_of_runs(rng: np.random.Generator, n: int = 300) -> Paired:
    """Corpus BLEU from matches and numbers of n-grams up to 4, which match at random, and both lengths."""
    quality, reference = rng.beta(6, 3, n), rng.integers(8, 40, n)

    def run() -> Array:
        length = np.maximum(4, reference + rng.integers(-4, 5, n))
        grams = np.stack([length - k for k in range(4)])
        matches = [rng.binomial(grams[k], quality ** (k + 1)) for k in range(4)]
        return np.stack([*matches, *grams, reference], axis=1).astype(np.float64)

    return paired(run(), run(), bleu)


def bleu(sums: Sequence[float]) -> float:
    if not all(sums[:4]):
        return 0.0
    precision = math.exp(sum(math.log(sums[k] / sums[4 + k]) for k in range(4)) / 4)
    return precision * min(1.0, math.exp(1 - sums[8] / sums[4]))


def measure(options: Options) -> Iterator[str]:
    """One line for each kind of comparison: how often the gate fired, by limit, with Wilson's interval."""
    del options  # this needs no data, no model and no engine
    yield heading("nothing changed")
    for n, times in SIZES.items():
        for noise in REDRAWN:
            for right in MEANS:
                yield line(f"{noise}, n={n}, {right:.0%} right", Accuracy(n, right, noise), times)
    yield line("token F1, n=300", f1, CONTINUOUS)
    yield line("BLEU of 0 to 1, n=300", bleu_of_runs, CONTINUOUS)
    yield alarms("against the last run that passed", chain(-math.inf))
    yield alarms("... with the mean as a threshold", chain(0.4))
    yield heading("40% right, and worse")
    for n in SIZES:
        for noise in REDRAWN:
            for drop in DROPS:
                yield line(f"{noise}, n={n}, {100 * drop:.0f} points", Accuracy(n, 0.4, noise, drop), POWER)


def line(what: str, compared: Compared, times: int) -> str:
    rng = np.random.default_rng(0)
    return alarms(what, [[compared(rng) for _ in range(times)]] * len(LIMITS))


def chain(threshold: float) -> list[list[Paired]]:
    """For each limit, comparisons of one model's runs of GSM8K's size, each with the last run that passed."""
    return [
        [one for seed in range(CHAINS) for one in _chain(threshold, limit, np.random.default_rng(seed))]
        for limit in LIMITS
    ]


def _chain(threshold: float, limit: float, rng: np.random.Generator) -> Iterator[Paired]:
    chances = rng.beta(SPREAD * 0.4, SPREAD * 0.6, max(SIZES))
    chances *= 0.4 / chances.mean()
    baseline = None
    for _ in range(RUNS):
        scores = rng.random(len(chances)) < chances
        passed = bool(scores.mean() >= threshold)
        if baseline is not None:
            compared = paired(of_mean(baseline), of_mean(scores))
            passed = passed and not regressed(compared, limit)
            yield compared
        if passed:
            baseline = scores


def heading(what: str) -> str:
    """The head of the columns: the gate by limit, and a gate of the drop alone at one point."""
    return f"GATE {what:36}" + "".join(f"{limit:>20.2f}" for limit in LIMITS) + f"{'0.01 without p':>20}"


def alarms(what: str, compared: Sequence[Sequence[Paired]]) -> str:
    """For the comparisons of each limit: the percentage that fires, and its 95 % interval."""
    fired = [[regressed(one, limit) for one in each] for each, limit in zip(compared, LIMITS, strict=True)]
    fired.append([one.difference < -0.01 for one in compared[1]])
    return f"GATE {what:36}" + "".join(f"{percentage(each):>20}" for each in fired)


def percentage(fired: Sequence[bool]) -> str:
    interval = wilson(sum(fired), len(fired))
    return f"{100 * sum(fired) / len(fired):.1f} [{100 * interval.low:.1f} {100 * interval.high:.1f}]"
