"""The kinds of tasks whose answers PARITY scores twice: by lm-evaluation-harness's filters and `exact_match`,
and by `extract` and `normalize`.

Each kind has the filters and the metric of a task of the harness, the same as a `Metric`, and answers made
(seeded) from forms in which models write them: right ones, wrong ones, and some without an answer.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import interpreter
from vllm_tasks import Metric
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.validation.scores import row_scores

CHILD = Path(__file__).with_name("lm_eval_filters_child.py")
ROWS = 200
"""Rows of each kind."""
INVALID = {"fallback": "[invalid]"}
"""What the harness takes for an answer in which a pattern finds nothing."""


@dataclass(frozen=True)
class Kind:
    """One kind of task: as the harness has it, as we have it, and the material of its answers."""

    name: str
    filters: list[dict[str, Any]]
    """The filters of the harness's task."""
    extract: list[Any]
    """The same as steps."""
    values: list[Any]
    """The targets; a list is several accepted texts."""
    forms: list[str]
    """Texts with `{x}` for a target and `{y}` for another."""
    metric: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the harness's `exact_match`."""
    normalize: list[Any] = field(default_factory=list)
    """The same as steps."""
    choices: list[str] | None = None
    """The texts of choices, if targets are letters in brackets."""
    answers: int = 1
    """Answers to each row."""


FREE = ["{x}", " {x} ", "{x}.", "It is {x}.", "I think {y}, no: {x}", "", "I do not know."]
ANSWER_IS = ["So the answer is {x}.", "the answer is {x}", "the answer is {y}. No, the answer is {x}.", *FREE]
GSM8K_IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]
MARKED = [
    "2 + 3 = {y}\n#### {x}",
    "#### {x}.",
    "#### {x}\n\nQuestion: {y}?\n#### {y}",
    "####{x}",
    "${x}.00",
    *FREE,
]
LETTER = [
    "({x})",
    "The answer is ({x}).",
    "Answer: {x}",
    "**{x}**",
    "{x}",
    "I take ({y}), or rather ({x}).",
    "",
]
DATES = ["03/04/2001", "The 5th of March", "“Tomorrow”, at 7", "$7"]
BY_TEXT = ["It is {t}.", "THE ANSWER: {t}", "not {u} but {t}", "Answer: {x}", "({x})", "It is\n{t}", ""]


def kinds() -> list[Kind]:
    """The kinds."""
    first = {"function": "take_first"}
    after = r"(?<=the answer is )(.*)(?=.)"
    groups = r"answer is (\([A-D]\))|[Aa]nswer: ([A-D])|\*\*([A-D])\*\*"
    case = {"ignore_case": True, "ignore_punctuation": True}
    plain = ["lower", "punctuation"]
    number = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    marked = r"#### (\-?[0-9\.\,]+)"
    gsm8k: dict[str, Any] = {
        "metric": {"regexes_to_ignore": GSM8K_IGNORED, "ignore_case": True, "ignore_punctuation": False},
        "normalize": [*({"remove": pattern} for pattern in GSM8K_IGNORED), "lower"],
        "values": ["18", "5", "1,000", "-3", "70000", "2.5"],
        "forms": MARKED,
    }
    aliases = [["The Beatles", "Beatles"], ["Paris"], ["U.S.A.", "America", "USA"], ["An apple"], ["7 Up"]]
    trivia_ignored = [r"\b(?:The |the |An |A |The |a |an )"]
    endings = dict(zip("1234", "abcd", strict=True))
    letters = [f"({letter})" for letter in "ABCD"]
    return [
        Kind(
            "BBH, text after a phrase", [_regex(after), first], [{"regex": after, **INVALID}, "first"],
            ["True", "False", "yes"], ANSWER_IS,
        ),
        Kind(
            "BBH, True or False, case ignored",
            [_regex(r"\b(?i:true|false)\b", -1), first],
            [{"regex": r"\b(?i:true|false)\b", "match": -1, **INVALID}, "first"],
            ["True", "False"], [*ANSWER_IS, "TRUE", "*{x}*"], case, plain,
        ),
        Kind(
            "BBH, valid or invalid", [_regex(r"\b(valid|invalid)\b"), first],
            [{"regex": r"\b(valid|invalid)\b", **INVALID}, "first"],
            ["valid", "invalid"], ANSWER_IS, case, plain,
        ),
        Kind(
            "BBH, letters and texts of choices",
            [{**_regex(r"(\([A-Z]\))", -1), "function": "multi_choice_regex", **case}, first],
            [
                {
                    "regex": r"(\([A-Z]\))", "match": -1, **INVALID, "choices": "choices",
                    "normalize": ["lower", "unicode_punctuation"],
                },
                "first",
            ],
            letters, BY_TEXT, choices=DATES,
        ),
        Kind(
            "word sorting", [_regex(r"(?:sorted|answer)[^:]*:([a-z\s,]+)"), {"function": "lowercase"}, first],
            [{"regex": r"(?:sorted|answer)[^:]*:([a-z\s,]+)", **INVALID}, "lower", "first"],
            ["ant bee cat", "bee cat dog", "cat"],
            ["sorted: {x}", "answer is: {x}.", "sorted words:\n{x}", "sorted: {y}\nanswer: {x}", *FREE],
            {"regexes_to_ignore": [r"\s+", ","]}, [{"remove": r"\s+"}, {"remove": ","}],
        ),
        Kind(
            "MMLU, letters in several groups", [_regex(groups), first],
            [{"regex": groups, **INVALID}, "first"],
            ["A", "B", "C", "D"], LETTER, case, plain,
        ),
        Kind(
            "MMLU, contents", [{**_regex(r"(\([A-Z]\))"), "function": "multi_choice_regex"}, first],
            [{"regex": r"(\([A-Z]\))", **INVALID, "choices": "choices"}, "first"],
            letters, BY_TEXT, choices=DATES,
        ),
        Kind("GSM8K, strict", [_regex(marked), first], [{"regex": marked, **INVALID}, "first"], **gsm8k),
        Kind(
            "GSM8K, flexible", [_regex(number, -1), first],
            [{"regex": number, "match": -1, **INVALID}, "first"], **gsm8k,
        ),
        Kind(
            "GSM8K, majority of 8 of 10",
            [{"function": "take_first_k", "k": 8}, _regex(number, -1), {"function": "majority_vote"}, first],
            [{"take": 8}, {"regex": number, "match": -1, **INVALID}, "majority"], **gsm8k, answers=10,
        ),
        Kind(
            "ARC, a letter", [{"function": "uppercase"}, _regex(r"\b[ABCD]\b"), first],
            ["upper", {"regex": r"\b[ABCD]\b", **INVALID}, "first"],
            ["A", "B", "C", "D"], [*LETTER, "({x}", "{x})"],
        ),
        Kind(
            "HellaSwag, numbers of endings",
            [
                _regex(r"\b([1-4])\b"),
                {"function": "map", "mapping_dict": endings, "default_value": "?"},
                first,
            ],
            [
                {"regex": r"\b([1-4])\b", **INVALID},
                {"map": endings, "default": "?"},
                "first",
            ],
            ["a", "b", "c"], ["1", "2.", "Ending 3", "4 or 1", "{x}", "none", ""],
        ),
        Kind(
            "TriviaQA, aliases", [{"function": "remove_whitespace"}, first], ["strip", "first"],
            aliases, ["{x}", " {x} ", "{x}.", "the {x}", "A {x}!", "{y}", "{x} 7", ""],
            {"regexes_to_ignore": trivia_ignored, **case}, [{"remove": trivia_ignored[0]}, *plain],
        ),
        Kind(
            "numbers ignored", [{"function": "remove_whitespace"}, first], ["strip", "first"],
            ["apple", "pear"], ["{x}", "7{x}", "{x} 7", "{y}1", "12"],
            {"ignore_numbers": True}, ["digits"],
        ),
    ]  # fmt: skip


def _regex(pattern: str, select: int = 0) -> dict[str, Any]:
    return {"function": "regex", "regex_pattern": pattern, "group_select": select}


def measure() -> Iterator[str]:
    """One line for each kind: the rows with equal scores, and how many are right."""
    made = [(kind, _rows(kind)) for kind in kinds()]
    orders = [
        {
            "filters": kind.filters,
            "metric": kind.metric,
            "docs": [{"choices": kind.choices} for _ in rows],
            "targets": [row.target if isinstance(row.target, list) else [row.target] for row in rows],
            "answers": [row.prediction for row in rows],
        }
        for kind, rows in made
    ]
    found = subprocess.run(
        [str(interpreter()), "-P", str(CHILD)],
        input=json.dumps(orders),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for (kind, rows), theirs in zip(made, json.loads(found.stdout), strict=True):
        metric = Metric(identifier="exact_match", extract=kind.extract, options={"normalize": kind.normalize})
        ours = row_scores(metric, rows, "miss")
        equal = sum(ours[row.row] == score for row, score in zip(rows, theirs, strict=True))
        right = sum(score == 1 for score in theirs)
        yield f"PARITY {equal}/{len(rows)} equal {kind.name} ({right} right)"


def _rows(kind: Kind) -> Sequence[Answer]:
    draw = random.Random(kind.name)
    rows = []
    for i in range(ROWS):
        target = draw.choice(kind.values)
        texts = [_text(kind, target, draw) for _ in range(kind.answers)]
        rows.append(Answer(i, target, texts, choices=kind.choices))
    return rows


def _text(kind: Kind, target: Any, draw: random.Random) -> str:
    """An answer: two times of three a right one, if its form has one."""
    others = [value for value in kind.values if value != target]
    said, other = (target, draw.choice(others)) if draw.random() < 2 / 3 else (draw.choice(others), target)
    x, y = (draw.choice(value) if isinstance(value, list) else value for value in (said, other))
    named = {}
    if kind.choices is not None:
        x, y = x.strip("()"), y.strip("()")
        named = {"t": kind.choices[ord(x) - ord("A")], "u": kind.choices[ord(y) - ord("A")]}
    text = draw.choice(kind.forms).format(x=x, y=y, **named)
    return text.upper() if draw.random() < 0.1 else text
