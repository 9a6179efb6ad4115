"""The part of a model that a validation uses."""

from __future__ import annotations

from typing import Protocol

from vllm_tasks.calls.call import Model
from vllm_tasks.validation import Validation


class Validated(Model, Protocol):
    """A model with the fields that a validation reads and writes."""

    @property
    def uuid(self) -> str: ...
    @property
    def validation(self) -> Validation | None: ...
    @property
    def metric_values(self) -> dict[str, dict[str, float]]: ...
