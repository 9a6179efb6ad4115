"""Models as they are made, and the one error of a model that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_tasks import VllmAPI, VllmModel

Maker = Callable[..., VllmAPI | VllmModel]


BOTH = pytest.mark.parametrize("make", [VllmAPI, VllmModel])


def refusal(make: Maker, **fields: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        make(**{"identifier": "m", **fields})
    assert refused.value.error_count() == 1 or "datatype" in fields
    return str(refused.value)
