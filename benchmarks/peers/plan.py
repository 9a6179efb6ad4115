"""The options of a run of the peers, and its rows."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import options, results
from benchmarks.options import Options
from benchmarks.workload import Row, half_repeated, questions, rows

SHORT, MIXED, PREFIXES, DUPLICATES, BAD, CRASH = "short", "mixed", "prefixes", "duplicates", "bad", "crash"
PARAMETERS, EMBED, SCORE = "parameters", "embed", "score"
POOLING = (EMBED, SCORE)
WORKLOADS = (SHORT, MIXED, PREFIXES, DUPLICATES, PARAMETERS, EMBED, SCORE, BAD, CRASH)
GROUPS = {
    "crash": (CRASH,),
    "clients": (SHORT, MIXED, BAD),
    "engines": (SHORT, MIXED, PREFIXES, DUPLICATES),
    "rows": (PARAMETERS, BAD),
    "pooling": POOLING,
}
"""The workloads of each group of sides."""
BAD_ROWS, CRASH_ROWS = 100, 400
TOKENS = 24
"""Output tokens of a short answer, equal for all rows, since some sides take one number for all."""
LOG_MEAN, LOG_SPREAD, STEP, CAP = 3.2, 0.8, 8, 192
"""For `mixed`: log(tokens) is normal (median 25 tokens, mean 34), rounded up to steps and capped."""
FAMILIES, PREFIX_WORDS, TINY_PREFIX = 16, 160, 40
"""For `prefixes`: the number of beginnings, and the words of each; fewer for the tiny model, which has a
token for every one or two letters."""


@dataclass(frozen=True)
class Plan:
    """One run. `only` has names of workloads and parts of names of sides, `groups` names of groups; empty
    means all."""

    options: Options
    rounds: int
    only: tuple[str, ...]
    groups: tuple[str, ...]
    short: bool
    output: Path
    command: str

    @property
    def count(self) -> int:
        return self.options.rows

    def has_workload(self, name: str) -> bool:
        wanted = [part for part in self.only if part in WORKLOADS]
        return not wanted or name in wanted

    def has_group(self, name: str) -> bool:
        """Whether the group takes part and has a workload of the run."""
        return (not self.groups or name in self.groups) and any(map(self.has_workload, GROUPS[name]))

    def has_side(self, name: str) -> bool:
        wanted = [part for part in self.only if part not in WORKLOADS]
        return not wanted or any(part.lower() in name.lower() for part in wanted)

    def rows(self, workload: str, round_: int) -> list[Row]:
        """The rows of a round; no prefix cache has them from an earlier round."""
        if workload == MIXED:
            return mixed(questions(self.options.data, self.count), round_)
        if workload == PARAMETERS:
            # No seeds: vLLM 0.32 on a CPU dies of one whose prompt it computes in parts ("CPU Generator does
            # not use offset").
            own = mixed(questions(self.options.data, self.count), round_)
            return [replace(row, sampling={"temperature": i % 8 / 8}) for i, row in enumerate(own)]
        if workload in POOLING:
            texts = questions(self.options.data, self.count)
            seconds = [*texts[1:], texts[0]] if workload == SCORE else [""] * len(texts)
            pairs = zip(texts, seconds, strict=True)
            return [Row(f"({round_:03d}) {text}", 0, second=second) for text, second in pairs]
        if workload == PREFIXES:
            words = TINY_PREFIX if self.short else PREFIX_WORDS
            return rows(sharing(self.options.data, self.count, words), (STEP,), round_)
        if workload == DUPLICATES:
            texts = questions(self.options.data, self.count // 2)
            return rows(half_repeated(texts), (TOKENS,), round_)
        if workload == BAD:
            return spoilt(rows(questions(self.options.data, BAD_ROWS), (STEP,), round_))
        count = CRASH_ROWS if workload == CRASH else self.count
        return rows(questions(self.options.data, count), (TOKENS,), round_)


def mixed(texts: Sequence[str], round_: int) -> list[Row]:
    """Answers of log-normal length, the same lengths in the same order in each round."""
    rng = random.Random(0)
    drawn = [rng.lognormvariate(LOG_MEAN, LOG_SPREAD) for _ in texts]
    lengths = [min(CAP, STEP * max(1, -(-int(tokens) // STEP))) for tokens in drawn]
    return [Row(f"({round_:03d}) {text}", tokens) for text, tokens in zip(texts, lengths, strict=True)]


def sharing(data: Path | None, count: int, length: int) -> list[str]:
    """Texts that begin with one of a few long prefixes, shuffled."""
    rng = random.Random(1)
    words = " ".join(questions(data, 1000)).split()
    beginnings = [" ".join(rng.choices(words, k=length)) for _ in range(FAMILIES)]
    texts = [f"{beginnings[i % FAMILIES]} {text}" for i, text in enumerate(questions(data, count))]
    rng.shuffle(texts)
    return texts


def spoilt(rows: Sequence[Row]) -> list[Row]:
    """The rows, of which one in a hundred, at least one, is longer than the model's limit."""
    count = max(1, len(rows) // 100)
    bad = {round((i + 0.5) * len(rows) / count) for i in range(count)}
    return [
        Row(f"{row.prompt} {'word ' * 2000}", row.max_tokens) if i in bad else row
        for i, row in enumerate(rows)
    ]


def parse(arguments: list[str]) -> Plan:
    """The plan from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    add = parser.add_argument
    add("--short", action="store_true", help="a tiny model, few rows, one round, only sides without network")
    add("--data", type=Path, help="JSONL with the prompts as `question`; default: made up")
    add("--model", type=Path, help="folder of the model; default: the demo's SmolLM2")
    add("--rows", type=int, default=None, help="rows of a round (192; 32 with --short)")
    add("--rounds", type=int, default=None, help="rounds that count (3; 1 with --short)")
    add("--concurrency", type=int, default=64, help="rows in flight of the clients of a server")
    add("--only", nargs="*", default=(), help=f"sides (parts of names) and workloads {WORKLOADS}")
    add(
        "--groups", nargs="*", default=(), choices=GROUPS, help="groups of sides; each has a part of the page"
    )
    add("--engine", type=json.loads, default={}, help="further engine arguments of all sides, as JSON")
    add("--output", type=Path, default=results.FILE, help="the page to write the parts Peers to")
    given = parser.parse_args(arguments)
    count = given.rows or (32 if given.short else 192)
    rounds = given.rounds or (1 if given.short else 3)
    command = f"python -m benchmarks.peers {' '.join(arguments)}".strip()
    own = options_of(given, count, rounds)
    return Plan(own, rounds, tuple(given.only), tuple(given.groups), given.short, given.output, command)


def options_of(given: argparse.Namespace, count: int, rounds: int) -> Options:
    """The options as those of the other benchmarks."""
    engine = json.dumps({**(TINY if given.short else {}), **given.engine})
    numbers = {"rows": count, "pairs": rounds, "concurrency": given.concurrency, "lengths": TOKENS}
    words = [f"--{name}={value}" for name, value in {**numbers, "engine": engine}.items()]
    words += [f"--{name}={value}" for name in ("data", "model") if (value := getattr(given, name))]
    return options.parse(words, ())


TINY: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 32}
"""Engine arguments for the tiny model of `--short`."""
