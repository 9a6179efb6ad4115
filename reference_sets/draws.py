"""Draws that are the same in every version of Python, which `random.choice` and `shuffle` need not be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A seeded source of choices, made of `random.Random.random` alone, whose values Python guarantees."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.number(0, len(items) - 1)]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items, in the order in which they are drawn."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]
