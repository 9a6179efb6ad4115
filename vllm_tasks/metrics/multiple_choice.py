"""Multiple choice: 1 if the right choice is the one that the model holds most likely, else 0; the value is
the share of rows where it is.

Range 0 to 1, higher is better. By log probability, as `acc` of lm-evaluation-harness; with
`normalize="characters"` by log probability per character, like its `acc_norm`; with "tokens" per token (Brown
et al. 2020, https://arxiv.org/abs/2005.14165, section 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Likelihood, Measure

Normalize = Literal["characters", "tokens"]


def score(prediction: Sequence[Likelihood], target: Any, *, normalize: Normalize | None = None) -> bool:
    """Whether choice number `target`, from 0, is the most likely one; of equals the first is taken.

    Raises `InvalidCall` for a target that is no index of a choice.
    """
    if normalize not in (None, "characters", "tokens"):
        raise InvalidCall(
            f"multiple_choice: normalize is 'characters', 'tokens' or None, not {normalize!r:.100}"
        )
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < len(prediction):
        raise InvalidCall(
            f"multiple_choice: the target {target!r:.100} is no index, from 0, of {len(prediction)} choices"
        )
    values = [_value(choice, normalize) for choice in prediction]
    return values.index(max(values)) == target


def _value(choice: Likelihood, normalize: Normalize | None) -> float:
    if normalize is None:
        return choice.logprob
    return choice.logprob / max(choice.characters if normalize == "characters" else choice.tokens, 1)


MEASURE = Measure(score, asks="likelihood")
