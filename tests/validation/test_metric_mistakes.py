"""Built-in metrics: mistakes and missing libraries that name their way out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.validation.scoring import score
from vllm_tasks import InvalidCall
from vllm_tasks.metrics import built_in
from vllm_tasks.metrics.measure import Likelihood


@pytest.mark.parametrize(
    ("name", "args", "options", "told"),
    [
        ("exact_match", ("a", "a"), {"normalize": ["lowr"]}, "'lowr'; did you mean 'lower'"),
        ("exact_match", ("a", "a"), {"normalize": "lower"}, r"\['strip', 'lower'\], not 'lower'"),
        ("exact_match", ("a", None), {}, "not None"),
        ("numeric_match", ("1", "none"), {}, "'none' has none"),
        ("numeric_match", ("1", float("nan")), {}, "number in the target"),
        ("numeric_match", ("1", 1), {"tolerance": -1}, "at least 0, such as 0.01, not -1"),
        ("numeric_match", ("1", 1), {"tolerance": "wide"}, "not 'wide'"),
        ("numeric_match", ("1", 1), {"tolerance": float("nan")}, "not nan"),
        ("contains", ("a", ""), {}, "the target is ''"),
        ("regex_match", ("a", "a"), {"pattern": "(a"}, r"'\(a' is not a pattern"),
        ("regex_match", ("a", "*"), {}, r"'\*' is not a pattern"),
        ("regex_match", ("a", "a"), {"pattern": 5}, "5 is not a pattern"),
        ("token_f1", ({"a": 1}, "a"), {}, "json_fields or exact_match"),
        ("token_f1", ("a", {"a": 1}), {}, "not {'a': 1}"),
        ("rouge", ("a", "a"), {"kind": "rougel"}, "did you mean 'rougeL'"),
        ("json_fields", ("{}", "[1]"), {}, r"an object with fields as target, not '\[1\]'"),
        ("json_fields", ("{}", {}), {}, "not {}"),
        ("json_fields", ("{}", {"city": 1}), {"fields": ["citi"]}, "'citi'; did you mean 'city'"),
        ("json_fields", ("{}", {"city": 1}), {"fields": "city"}, r"\['city'\], not 'city'"),
        ("accuracy", ("a", ["a", "b"]), {}, "exact_match takes several"),
        ("accuracy", ("a", "yess"), {"labels": ["yes", "no"]}, "did you mean 'yes'"),
        ("accuracy", ("a", "a"), {"labels": ["a", "A "]}, "twice"),
        ("accuracy", ("a", "a"), {"labels": "a"}, "not 'a'"),
        ("multiple_choice", ([Likelihood(-1, 1, 1)], 1), {}, "an index, from 0, of the 1 choices, not 1"),
        (
            "multiple_choice",
            ([Likelihood(-1, 1, 1)], 0),
            {"normalize": "words"},
            "'tokens' or None, not 'words'",
        ),
        ("judge", ({"score": 1}, None), {"scale": (5, 1)}, r"such as \[1, 5\], not \(5, 1\)"),
        ("judge", ({"score": 1}, None), {"scale": 5}, "not 5"),
    ],
)
def test_a_mistake_of_the_call_names_the_way_out(
    name: str, args: tuple[Any, ...], options: dict[str, Any], told: str
) -> None:
    """A target or an option that a metric cannot take is refused with the allowed ones."""
    with pytest.raises(InvalidCall, match=told):
        score(name, *args, **options)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bleu", "sacrebleu.metrics.bleu"),
        ("chrf", "sacrebleu.metrics.chrf"),
        ("rouge", "rouge_score.rouge_scorer"),
        ("edit_similarity", "rapidfuzz.distance"),
    ],
)
def test_a_missing_library_comes_with_its_install_line(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics of other packages name the install command."""
    monkeypatch.setitem(sys.modules, module, None)
    if name == "rouge":
        sys.modules["vllm_tasks.metrics.rouge"]._scorer.cache_clear()
    sides = (["a"], ["a"]) if built_in(name).kind == "sums" else ("a", "a")
    with pytest.raises(ImportError, match=r"pip install 'vllm-tasks\[eval\]'"):
        score(name, *sides)


def test_libraries_are_imported_when_a_metric_scores() -> None:
    """Naming a metric does not import the library that computes it."""
    code = (
        "import sys; from vllm_tasks.metrics import BUILT_IN, built_in; [built_in(n) for n in BUILT_IN]; "
        "print(*{m.partition('.')[0] for m in sys.modules}"
        " & {'sacrebleu', 'rouge_score', 'nltk', 'rapidfuzz', 'sklearn'})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == ""
