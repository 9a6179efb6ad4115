"""JSON fields: the fraction of the target's fields that are right in the answer; the value is the mean over
rows.

Range 0 to 1, higher is better. Fields are the keys of the outermost object. Extra fields of the answer are
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.data import data_of, same
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any, *, fields: Sequence[str] | None = None) -> float:
    """Return the fraction of fields that are equal in the answer and the target.

    Numbers are compared by value (1 is 1.0), texts character by character, lists and objects item by item.

    Args:
        prediction: An object, or a text that is JSON. Anything but an object scores 0.
        target: An object with fields, or its JSON.
        fields: The only fields that count. Every target must have them.

    Raises:
        InvalidCall: The target is not a JSON object with fields, or lacks one of `fields`.
    """
    wanted = data_of(target)
    if not isinstance(wanted, Mapping) or not wanted:
        raise InvalidCall(f"json_fields takes an object with fields as target, not {target!r:.100}")
    names = _fields(fields, wanted)
    answer = data_of(prediction)
    if not isinstance(answer, Mapping):
        return 0.0
    return sum(name in answer and same(answer[name], wanted[name]) for name in names) / len(names)


def _fields(fields: Sequence[str] | None, wanted: Mapping[str, Any]) -> Sequence[str]:
    if fields is None:
        return list(wanted)
    if isinstance(fields, str) or not isinstance(fields, Sequence) or not fields:
        raise InvalidCall(
            f"json_fields: fields must be a list of names such as ['city'], not {fields!r:.100}"
        )
    for name in fields:
        if name not in wanted:
            raise InvalidCall(
                f"json_fields: a target has no field {name!r:.100}{near(str(name), wanted)}: "
                f"{dict(wanted)!r:.200}"
            )
    return fields


MEASURE = Measure(score)
