"""What a model is validated with. Kept and saved with a model; validating comes later."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_tasks.callables import DottedCallable


class Dataset(BaseModel):
    """Rows with known answers: a `select` on a datalayer, or `raw_data`."""

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1)
    select: str | None = None
    raw_data: list[dict[str, Any]] | None = None
    db: str | None = Field(default=None, description="Name of a saved Datalayer; the model's when empty.")
    sample_size: int | None = Field(default=None, ge=1)
    random_seed: int = 0
    pin: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if (self.select is None) == (self.raw_data is None):
            raise ValueError(f"dataset {self.identifier!r} needs exactly one of select and raw_data")
        return self


class Metric(BaseModel):
    """A named score: the name of a built-in, or a function of one's own by dotted path."""

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1)
    object: DottedCallable | None = Field(default=None, description="None: the built-in of this name.")


class Validation(BaseModel):
    """Datasets and metrics of a model, and the limits that it must hold."""

    model_config = ConfigDict(extra="forbid")

    datasets: list[Dataset] = Field(min_length=1)
    metrics: list[Metric] = Field(min_length=1)
    key: tuple[str, str] = Field(description="Columns of a dataset: the input and its known answer.")
    thresholds: dict[str, float] = {}
    max_regression: dict[str, float] = {}
