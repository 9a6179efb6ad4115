"""The rows that both sides get: questions from a file, or made-up ones of the same shape."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_MEAN, LOG_SPREAD = 3.76, 0.37
"""Mean and standard deviation of log(words) over the 1,319 questions of GSM8K's test set (measured: a mean of
46 words); https://github.com/openai/grade-school-math."""
TEXT = (
    "Sam Maria Tom has gives buys sells each every day week hours minutes apples books boxes dollars "
    "twice half more less than left total how many much does if the a and then first second for of "
    "3 5 7 12 20 45 100 school friends bakery"
)


@dataclass(frozen=True)
class Row:
    """A prompt, and the number of tokens of its answer; without `ignore_eos` that is an upper limit, and 0 is
    for a pooling model.

    `sampling` has further parameters of the row's own. `second` is the other text of a pair that is scored.
    """

    prompt: str
    max_tokens: int
    ignore_eos: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    second: str = ""

    def parameters(self) -> dict[str, Any]:
        """All sampling parameters of the row, by vLLM's names: greedy, unless the row has its own."""
        return {
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "max_tokens": self.max_tokens,
            **self.sampling,
        }


def questions(data: Path | None, count: int, seed: int = 0) -> list[str]:
    """`count` distinct texts: the `question` fields of a JSONL file in shuffled order, or made-up ones.

    A file with fewer questions is repeated, each time with another number before the questions.
    """
    rng = random.Random(seed)
    if data is None:
        return [f"{i}. {made_up(rng)}" for i in range(count)]
    with data.open(encoding="utf-8") as lines:
        found = list(dict.fromkeys(json.loads(text)["question"] for text in lines))
    rng.shuffle(found)
    return [
        found[i] if i < len(found) else f"{i // len(found)}. {found[i % len(found)]}" for i in range(count)
    ]


def made_up(rng: random.Random) -> str:
    """A text with as many words as a question of GSM8K."""
    words = max(5, round(rng.lognormvariate(LOG_MEAN, LOG_SPREAD)))
    return " ".join(rng.choices(TEXT.split(), k=words)) + "?"


def rows(texts: Sequence[str], lengths: Sequence[int], round_: int, seed: int = 0) -> list[Row]:
    """The rows of a round, shuffled, with an equal number of rows for each length.

    Each prompt begins with the number of its round, so that no prefix cache has it from an earlier round. All
    rounds have the same total length.
    """
    tokens_of = [lengths[i % len(lengths)] for i in range(len(texts))]
    random.Random(seed).shuffle(tokens_of)
    return [Row(f"({round_:03d}) {text}", tokens) for text, tokens in zip(texts, tokens_of, strict=True)]


def by_length(rows: Sequence[Row]) -> dict[int, list[str]]:
    """Prompts by the length of their answers: a call of `predict_batches` for each `max_tokens`."""
    groups: dict[int, list[str]] = {}
    for row in rows:
        groups.setdefault(row.max_tokens, []).append(row.prompt)
    return groups


def output_tokens(rows: Sequence[Row]) -> int:
    return sum(row.max_tokens for row in rows)


def half_repeated(texts: Sequence[str], seed: int = 0) -> list[str]:
    """All texts twice, shuffled."""
    doubled = [*texts, *texts]
    random.Random(seed).shuffle(doubled)
    return doubled
