"""Inputs, targets and answers as short texts for pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.printable import one_line

TEXT_SHOWN = 200
"""Characters of an input, an answer or a target on a page."""


def text_of(value: Any) -> str:
    """Return a value on one line: a scalar as in a prompt, data as JSON, anything else as its `repr`."""
    return one_line(_readable(value), TEXT_SHOWN)


def inputs_of(inputs: Sequence[Any]) -> str:
    """Return the inputs of a row on one line; a single one stands for itself."""
    return text_of(inputs[0] if len(inputs) == 1 else list(inputs))


def _readable(value: Any) -> str:
    try:
        if value is None or isinstance(value, bool | list | dict):
            return json.dumps(value, ensure_ascii=False, default=_readable)
        return plain_text(value)
    except (TypeError, ValueError):
        return repr(value)
