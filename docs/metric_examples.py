"""An example of each built-in metric, for the page of metrics; the values are computed there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.results import table
from vllm_tasks import Metric
from vllm_tasks.metrics.classes import Label
from vllm_tasks.metrics.measure import Answer, Likelihood
from vllm_tasks.validation.scores import score

SECONDS, TOKENS = 1.5, 12
"""What each answer takes."""


@dataclass(frozen=True)
class Example:
    """Answers with their targets, and the metric that scores them."""

    metric: str
    rows: Sequence[tuple[Any, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    answers: str | None = None
    """The answers in words, if they are neither text nor data."""
    targets: str | None = None

    def value(self) -> float:
        """The value over the rows."""
        rows = [
            Answer(i, target, prediction, seconds=SECONDS, completion_tokens=TOKENS)
            for i, (prediction, target) in enumerate(self.rows)
        ]
        return score(Metric(identifier=self.metric, options=self.options), rows, "miss").value.value


YES = Label.of("yes", {"yes": 0.8, "no": 0.2})
NUMBERS = [(1, 1), (3, 2), (2, 3), (8, 4)]
CHOICES = [Likelihood(-2.1, 2, 10), Likelihood(-0.7, 1, 5)]
EXAMPLES = [
    Example("exact_match", [("Paris.", "paris")], {"normalize": ["lower", "punctuation"]}),
    Example("numeric_match", [("5 + 7 = 12, so it is 1,012.0 in all.", "1012")]),
    Example("contains", [("It is Paris.", ["paris", "Paname"])], {"ignore_case": True}),
    Example("regex_match", [("The answer is (B).", "B")], {"pattern": r"answer is \((.)\)"}),
    Example("token_f1", [("The capital is Paris", "Paris")]),
    Example("rouge", [("the cat sat", "the cat sat down")]),
    Example("edit_similarity", [("Pariss", "Paris")]),
    Example("bleu", [("the cat sat on the mat", "the cat sat on a mat")]),
    Example("chrf", [("the cat sat on the mat", "the cat sat on a mat")]),
    Example("json_valid", [('{"name": "Ada"}', None)], targets="any"),
    Example("json_fields", [('{"name": "Ada", "age": 35}', {"name": "Ada", "age": 36})]),
    Example("accuracy", [(" Spam", "spam")]),
    Example("macro_f1", [("spam", "spam"), ("spam", "ham"), ("ham", "ham"), ("ham", "ham")]),
    Example("log_loss", [({"probabilities": {"yes": 0.8, "no": 0.2}}, "yes")]),
    Example("pearson", NUMBERS),
    Example("spearman", NUMBERS),
    Example("recall_at_k", [(["d7", "d1", "d2"], ["d1", "d2"])], {"k": 2}),
    Example("ndcg_at_k", [(["d7", "d1", "d2"], {"d1": 3, "d2": 1})], {"k": 2}),
    Example("brier", [(YES, "yes")], answers="`yes`, of probability 0.8"),
    Example("expected_calibration_error", [(YES, "yes")], answers="`yes`, of probability 0.8"),
    Example(
        "multiple_choice",
        [(CHOICES, 1)],
        {"choices": "endings"},
        answers="log-probabilities of two endings, -2.1 and -0.7",
    ),
    Example(
        "perplexity",
        [([Likelihood(-6.0, 3, 12)], "text")],
        answers="log-probabilities of three tokens, -6 in all",
        targets="a text",
    ),
    Example("latency", [("Paris", None)], answers="any, after 1.5 s", targets="any"),
    Example("output_tokens", [("Paris", None)], answers="any of 12 tokens", targets="any"),
    Example(
        "judge",
        [({"reason": "Short and right.", "score": 4}, None)],
        {"model": "vllm-api/judge", "rubric": "Short and right.", "scale": [1, 5]},
        answers="any, and the judge says 4",
        targets="any",
    ),
]


def examples() -> str:
    """The table of the page."""
    rows = [
        (
            f"`{one.metric}`",
            _code(one.options) if one.options else "",
            one.answers or "; ".join(_code(prediction) for prediction, _ in one.rows),
            one.targets or "; ".join(_code(target) for _, target in one.rows),
            f"{one.value():.4g}",
        )
        for one in EXAMPLES
    ]
    return table(("metric", "options", "answer", "target", "value"), rows).replace("--:", "---")


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"
