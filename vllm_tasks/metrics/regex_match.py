"""Regex match: 1 if a pattern finds the target, else 0; the value is the fraction of rows where it does.

Range 0 to 1, higher is better. Patterns are those of Python's `re`. They count as in the filters of
lm-evaluation-harness (Gao et al. 2024, https://zenodo.org/records/12608602). A pattern with nested
repetitions can take time exponential in the answer's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.extraction import found, found_choice
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import Step, accepted, check_steps, compiled, normalized, text_of


def score(
    prediction: Any,
    target: Any,
    *,
    pattern: str | None = None,
    last: bool = False,
    normalize: Sequence[Step | dict[str, str]] = (),
    choices: Sequence[str] | None = None,
) -> bool:
    """Return whether the pattern finds the target.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which any may match. Without `pattern` it is itself the pattern
            and may match anywhere in the answer.
        pattern: A pattern whose first match in the answer must equal the target. If it has groups, the first
            group of the match that is not empty counts. White space at the ends is ignored.
        last: Use the last match instead of the first.
        normalize: Steps applied to the match and to the target, as in `exact_match`.
        choices: The row's choices; the option is the column that has them. The target is then a letter in
            brackets, such as (B). If the pattern does not match, the text of a choice or a letter after a
            colon counts too; `normalize` is applied to the answer and the choices before texts are compared.

    Raises:
        InvalidCall: The pattern or a step is not valid, or the target or the answer is not a text.
    """
    answer, texts = text_of(prediction, "regex_match"), accepted(target, "regex_match")
    steps = check_steps(normalize)
    if pattern is None:
        if steps or choices is not None:
            raise InvalidCall("regex_match: normalize and choices need a pattern")
        return any(compiled(text, "regex_match").search(answer) for text in texts)
    expression, match = compiled(pattern, "regex_match"), -1 if last else 0
    if choices is None:
        extracted = found(expression, answer, match)
    else:
        extracted = found_choice(expression, answer, choices, steps, match)
    wanted = {normalized(text, steps).strip() for text in texts}
    return extracted is not None and normalized(extracted, steps).strip() in wanted


MEASURE = Measure(score)
