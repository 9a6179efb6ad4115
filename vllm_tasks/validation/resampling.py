"""Rows of sums: their metric, random samples of them, and swaps between two runs.

The order of the rows has no influence, and equal seeds give equal draws (with one release of numpy). Equal
rows are drawn together, which gives the same distribution and is much less work for scores of 0 and 1.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Total = Callable[[Sequence[float]], float]
"""Returns the metric for a sum of row vectors, as `Sums.total` does."""
Array = NDArray[np.float64]
Counts = NDArray[np.int64]

CHUNK = 2**22
"""Numbers in memory at once (32 MiB)."""
ALIKE = 8
"""From so many rows for each distinct row on, counts are drawn from their distribution, not row by row."""


def mean(sums: Sequence[float]) -> float:
    """The `total` for rows (score, 1): their mean; nan without rows."""
    return sums[0] / sums[1] if sums[1] else math.nan


def vectors(rows: ArrayLike) -> Array:
    """Rows as floats. -0.0 becomes 0.0, since they are equal but their bits, which are hashed, differ."""
    return np.asarray(rows, dtype=np.float64) + 0.0


def column_sums(rows: Array) -> list[float]:
    """The sum of each column; `fsum` makes it independent of the order of the rows."""
    return [math.fsum(column.tolist()) for column in rows.T]


def totals(sums: Array, total: Total) -> Array:
    """The metric of each row of sums."""
    if total is mean:
        with np.errstate(divide="ignore", invalid="ignore"):
            means: Array = sums[:, 0] / sums[:, 1]
        return means
    return np.array([total(row) for row in sums.tolist()], dtype=np.float64)


def distinct_rows(*sides: Array) -> tuple[Counts, Counts]:
    """The first position of each distinct row, over all sides, and the number of such rows.

    They are sorted by a hash of their contents, so the order of the input has no influence.
    """
    first: dict[bytes, int] = {}
    counts: Counter[bytes] = Counter()
    for i, row in enumerate(zip(*sides, strict=True)):
        key = hashlib.blake2b(b"".join(side.tobytes() for side in row), digest_size=16).digest()
        first.setdefault(key, i)
        counts[key] += 1
    order = sorted(counts)
    return np.array([first[k] for k in order], np.int64), np.array([counts[k] for k in order], np.int64)


def few(counts: Counts) -> bool:
    """Whether so few rows are equal that drawing row by row is faster than drawing counts."""
    return int(counts.sum()) < ALIKE * len(counts)


def generator(seed: int, use: str) -> np.random.Generator:
    """A generator for one use, so that other draws with the same seed have no influence."""
    return np.random.Generator(np.random.PCG64([seed % 2**64, *use.encode()]))


def chunks(size: int, width: int) -> Iterator[int]:
    """Split `size` into parts; a part, as rows of this width, has at most `CHUNK` numbers."""
    part = max(1, CHUNK // max(1, width))
    for start in range(0, size, part):
        yield min(part, size - start)


def draws(rng: np.random.Generator, counts: Counts, size: int) -> Iterator[Array]:
    """How often each distinct row is drawn, for `size` samples, each with as many rows as the input."""
    n, distinct = int(counts.sum()), len(counts)
    owners = np.repeat(np.arange(distinct), counts)
    for part in chunks(size, n):
        if few(counts):
            drawn = owners[rng.integers(0, n, (part, n))] + distinct * np.arange(part)[:, None]
            times = np.bincount(drawn.ravel(), minlength=part * distinct).reshape(part, distinct)
        else:
            times = rng.multinomial(n, counts / n, part)
        yield times.astype(np.float64)


def random_swaps(rng: np.random.Generator, counts: Counts, size: int) -> Iterator[Array]:
    """How many occurrences of each distinct row are swapped, `size` times; each swap has probability 1/2."""
    for part in chunks(size, len(counts)):
        if counts.max() == 1:
            yield rng.integers(0, 2, (part, len(counts)), dtype=np.uint8).astype(np.float64)
        else:
            yield rng.binomial(counts, 0.5, (part, len(counts))).astype(np.float64)


def every_swap(counts: Sequence[int]) -> tuple[Array, Array]:
    """All combinations of swapped occurrences, and the probability of each."""
    chances = [[math.comb(c, swapped) / 2**c for swapped in range(c + 1)] for c in counts]
    swapped = np.array(list(itertools.product(*(range(c + 1) for c in counts))), dtype=np.float64)
    return swapped, np.array([math.prod(chosen) for chosen in itertools.product(*chances)])
