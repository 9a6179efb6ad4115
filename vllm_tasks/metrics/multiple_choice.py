"""Multiple choice: 1 if the right choice is the most likely one under the model, else 0; the value is the
fraction of rows where it is.

Range 0 to 1, higher is better. Choices are compared by log probability, like `acc` of lm-evaluation-harness;
with `normalize="characters"` by log probability per character, like its `acc_norm`; with "tokens" per token
(Brown et al. 2020, https://arxiv.org/abs/2005.14165, section 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Likelihood, Measure

Normalize = Literal["characters", "tokens"]


def score(prediction: Sequence[Likelihood], target: Any, *, normalize: Normalize | None = None) -> bool:
    """Return whether the right choice is the most likely one. Of equally likely ones, the first counts.

    Args:
        prediction: The likelihood of each choice.
        target: The index of the right choice, from 0.
        normalize: What the log probability is divided by: the choice's number of characters or tokens.

    Raises:
        InvalidCall: The target is not an index of a choice, or `normalize` is unknown.
    """
    if normalize not in (None, "characters", "tokens"):
        raise InvalidCall(
            f"multiple_choice: normalize must be 'characters', 'tokens' or None, not {normalize!r:.100}"
        )
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < len(prediction):
        raise InvalidCall(
            f"multiple_choice: the target must be an index, from 0, of the {len(prediction)} choices, "
            f"not {target!r:.100}"
        )
    values = [_value(choice, normalize) for choice in prediction]
    return values.index(max(values)) == target


def _value(choice: Likelihood, normalize: Normalize | None) -> float:
    if normalize is None:
        return choice.logprob
    return choice.logprob / max(choice.characters if normalize == "characters" else choice.tokens, 1)


MEASURE = Measure(score, asks="likelihood")
