"""COVERAGE: how often the 95 % interval of a value holds the true value, by metric and number of rows.

This is a simulation with the code of a validation: `score` is called for answers that are drawn from a known
distribution. Fractions need no simulation: the line has the least coverage over 999 probabilities from 0.5 to
1 - 1 / n, summed exactly. `marked` is the percentage of the intervals that are reported as approximate. Goal:
93 to 97 of 100 from 100 rows on, or marked. A figure that misses it, by more than the chance of the draws
(95 %), is in **bold**.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom  # type: ignore[import-untyped]

from benchmarks import results
from benchmarks.options import Options
from vllm_tasks.metrics.classes import Label
from vllm_tasks.metrics.measure import Answer, Likelihood
from vllm_tasks.validation import Metric
from vllm_tasks.validation.intervals import proportion, wilson
from vllm_tasks.validation.scores import score

PART = "Coverage of intervals"
SIZES = {20: 500, 100: 600, 1_000: 200}
"""Rows, and data sets that are drawn."""
OF_SETS = 150
"""Data sets of metrics of which each resample is scored anew."""
PROBABLE = 0.55, 0.95
"""The probabilities of labels, which are drawn uniformly."""
LEAST, MOST = 0.93, 0.97
"""The goal, from 100 rows on."""

Rows = Sequence[tuple[Any, Any]]
"""Predictions and targets."""


@dataclass(frozen=True)
class Case:
    """A metric, a draw of n predictions with their targets (and clusters), and the true value."""

    what: str
    metric: Metric
    draw: Callable[[np.random.Generator, int], tuple[Rows, Sequence[int] | None]]
    truth: float


def own(prediction: float, target: object) -> float:
    """A score that is the prediction."""
    return prediction


def of_scores(
    what: str, draw: Callable[[np.random.Generator, int], NDArray[np.float64]], truth: float
) -> Case:
    return Case(
        what,
        Metric(identifier="own", object=own),
        lambda rng, n: ([(value, "") for value in draw(rng, n).tolist()], None),
        truth,
    )


def ratings(what: str, levels: Sequence[float], chances: Sequence[float]) -> Case:
    return of_scores(what, lambda rng, n: rng.choice(levels, n, p=chances), float(np.dot(levels, chances)))


def f1_of_rows() -> Case:
    def draw(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        whole = rng.random(n) < 0.5
        return np.where(whole, (rng.random(n) < 0.6) * 1.0, rng.beta(2, 2, n))

    return of_scores("token F1, half of it 0 or 1", draw, 0.55)


def passages() -> Case:
    """Five questions on each passage, whose difficulty they share."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, Sequence[int]]:
        chances = np.repeat(rng.beta(1.5, 1.0, n // 5), 5)
        return [(float(right), "") for right in rng.random(n) < chances], np.repeat(
            np.arange(n // 5), 5
        ).tolist()

    return Case("a fraction, 5 rows on each passage", Metric(identifier="own", object=own), draw, 0.6)


def macro_f1(classes: int, right: float, zipf: bool) -> Case:
    sizes = 1 / np.arange(1, classes + 1) if zipf else np.ones(classes)
    wrong = (1 - right) / (classes - 1)
    joint = (sizes / sizes.sum())[:, None] * (
        np.full((classes, classes), wrong) + np.eye(classes) * (right - wrong)
    )
    names = [f"class {i}" for i in range(classes)]

    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, None]:
        cells = rng.choice(classes**2, n, p=joint.ravel()).tolist()
        return [(names[cell % classes], names[cell // classes]) for cell in cells], None

    truth = float(np.mean(2 * joint.diagonal() / (joint.sum(axis=0) + joint.sum(axis=1))))
    sizes_in_words = "sizes of 1, 1/2, 1/3, ..." if zipf else "equal sizes"
    return Case(
        f"macro_f1, {classes} classes, {right:.0%} right, {sizes_in_words}",
        Metric(identifier="macro_f1", options={"labels": names}),
        draw,
        truth,
    )


def correlated(metric: str, rho: float) -> Case:
    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, None]:
        x, noise = rng.normal(size=(2, n))
        return list(zip((rho * x + math.sqrt(1 - rho**2) * noise).tolist(), x.tolist(), strict=True)), None

    # Spearman's correlation of a normal distribution: Kruskal 1958, JASA 53:814-861.
    truth = rho if metric == "pearson" else 6 / math.pi * math.asin(rho / 2)
    return Case(f"{metric} of {rho:g}", Metric(identifier=metric), draw, truth)


def of_labels(metric: str, truth: float, gap: float = 0.0, what: str = "") -> Case:
    """Labels of two classes, which are right less often than they are probable, by `gap`."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, None]:
        probable = rng.uniform(*PROBABLE, n)
        right = rng.random(n) < probable - gap
        labels = [Label.of("a", {"a": p, "b": 1 - p}) for p in probable.tolist()]
        return list(zip(labels, np.where(right, "a", "b").tolist(), strict=True)), None

    return Case(what or metric, Metric(identifier=metric), draw, truth)


def calibration(gap: float) -> Case:
    name = "expected_calibration_error"
    return of_labels(name, gap, gap, f"{name} of {gap:g}")


def perplexity() -> Case:
    """Texts of 5 to 59 tokens, whose mean log-probability differs from text to text."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, None]:
        tokens, surprise = rng.integers(5, 60, n), rng.gamma(4, 0.5, n)
        sums = (-tokens * surprise).tolist()
        return [([Likelihood(s, t, 4 * t)], "") for s, t in zip(sums, tokens.tolist(), strict=True)], None

    return Case("perplexity", Metric(identifier="perplexity"), draw, math.exp(2.0))


def translations() -> Case:
    """Corpus chrF of word lists of which some words are others; the truth is the value of 40,000 rows."""
    words = [f"{a}{b}{c}" for a in "ktmn" for b in "aeio" for c in "rlsd"]

    def draw(rng: np.random.Generator, n: int) -> tuple[Rows, None]:
        rows = []
        for kept, length in zip(rng.beta(6, 2, n), rng.integers(5, 15, n), strict=True):
            right = rng.choice(words, length)
            said = np.where(rng.random(length) < kept, right, rng.choice(words, length))
            rows.append((" ".join(said), " ".join(right)))
        return rows, None

    metric = Metric(identifier="chrf")
    rows, _ = draw(np.random.default_rng(1), 40_000)
    return Case("chrf", metric, draw, score(metric, answers(rows), "miss").value.value)


def answers(rows: Rows) -> list[Answer]:
    return [Answer(i, target, prediction) for i, (prediction, target) in enumerate(rows)]


def cases() -> list[Case]:
    chances = np.linspace(*PROBABLE, 10_001)
    entropy = -chances * np.log(chances) - (1 - chances) * np.log(1 - chances)
    return [
        ratings("ratings of 1 to 5, most in the middle", range(1, 6), (0.1, 0.15, 0.2, 0.3, 0.25)),
        ratings("ratings of 1 to 5, 80 % of them 5", range(1, 6), (0.02, 0.03, 0.05, 0.1, 0.8)),
        ratings(
            "judge scores of 0 to 1, 95 % of them 1", (0, 0.25, 0.5, 0.75, 1), (0.01, 0, 0.01, 0.03, 0.95)
        ),
        f1_of_rows(),
        of_scores("similarity near 1, beta(20, 1)", lambda rng, n: rng.beta(20, 1, n), 20 / 21),
        of_scores("seconds, exponential", lambda rng, n: 5 * rng.exponential(1, n), 5),
        of_scores(
            "seconds, log-normal, sigma 0.5", lambda rng, n: 5 * rng.lognormal(0, 0.5, n), 5 * math.exp(0.125)
        ),
        of_scores("seconds, log-normal, sigma 1", lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5)),
        of_scores("seconds, log-normal, sigma 1.5", lambda rng, n: rng.lognormal(0, 1.5, n), math.exp(1.125)),
        passages(),
        macro_f1(2, 0.95, True),
        macro_f1(3, 0.8, False),
        macro_f1(10, 0.7, True),
        macro_f1(10, 0.9, True),
        translations(),
        correlated("pearson", 0.6),
        correlated("pearson", 0.95),
        correlated("spearman", 0.6),
        calibration(0.0),
        calibration(0.1),
        of_labels("brier", float(np.mean(chances * (1 - chances)))),
        of_labels("log_loss", float(entropy.mean())),
        perplexity(),
    ]


def measure(options: Options) -> Iterator[str]:
    """One line for each kind of metric and number of rows; they are also a table of RESULTS.md."""
    del options  # this needs no data, no model and no engine
    table: dict[str, list[str]] = {}
    for n in SIZES:
        least = min(fractions_held(n))
        table.setdefault("a fraction (the least over all probabilities)", []).append(f"{least:.3f}")
        yield f"COVERAGE {least:.3f} a fraction (the least over all probabilities) n={n}"
    for case in cases():
        for n, times in SIZES.items():
            times = min(times, OF_SETS) if case.metric.identifier in ("spearman", "chrf") else times
            held, marked = coverage(case, n, times)
            note = f" ({marked:.0%} marked)" if marked >= 0.005 else ""
            missed = n >= 100 and marked < 0.5 and is_beyond(held, times)
            table.setdefault(case.what, []).append(f"**{held:.3f}**{note}" if missed else f"{held:.3f}{note}")
            yield f"COVERAGE {held:.3f} {case.what} n={n}{note}"
    results.record(
        PART,
        "make bench-COVERAGE",
        f"{__doc__.split(chr(10) * 2)[1]}\n\n"
        + results.table(
            ("metric", *(f"n = {n:,}" for n in SIZES)), [(what, *cells) for what, cells in table.items()]
        ),
        ("numpy",),
    )


def is_beyond(held: float, times: int) -> bool:
    """Whether a coverage in so many data sets is below or above the goal by more than chance."""
    interval = wilson(round(held * times), times)
    return interval.high < LEAST or interval.low > MOST


def fractions_held(n: int) -> list[float]:
    """The coverage of the interval of a fraction, by its probability."""
    hits = np.arange(n + 1)
    ends = np.array([(found.low, found.high) for found in (proportion(k, n) for k in range(n + 1))])
    return [
        float(binom.pmf(hits, n, p)[(ends[:, 0] <= p) & (p <= ends[:, 1])].sum())
        for p in np.linspace(0.5, 1 - 1 / n, 999)
    ]


def coverage(case: Case, n: int, times: int) -> tuple[float, float]:
    """The fraction of intervals that hold the truth, and of those that are marked as approximate."""
    rng = np.random.default_rng(0)
    held, marked = 0, 0
    for _ in range(times):
        rows, clusters = case.draw(rng, n)
        value = score(case.metric, answers(rows), "miss", clusters).value
        held += value.low <= case.truth <= value.high
        marked += value.approximate is not None
    return held / times, marked / times
