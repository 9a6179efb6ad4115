"""The definition of a data set: rows with known answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_tasks.datalayer.table_names import check_name
from vllm_tasks.validation.sets import ReferenceName


class Dataset(BaseModel):
    """Rows with known answers: a `select` on a datalayer, `raw_data`, or a `reference` set of the package.

    The sample of `sample_size` rows depends only on `random_seed` and the rows' contents: it is the same on
    every machine and from every kind of table. With `pin`, later runs use the snapshot of the first run.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # rows, or a URL, may be in it

    identifier: str = Field(min_length=1, description="Name of the data set in metric_values and tables.")
    select: str | None = Field(
        default=None,
        title="Select",
        description="A table, one SELECT, or in a lake a path or a glob. Give one of select, raw data and "
        "reference.",
    )
    raw_data: list[dict[str, Any]] | None = Field(
        default=None, title="Raw data", description="The rows themselves, in place of a select."
    )
    reference: ReferenceName | None = Field(
        default=None,
        title="Reference set",
        description="A reference set of the package, in place of a select.",
    )
    db: str | None = Field(
        default=None,
        title="Datalayer",
        description="Name of a saved Datalayer to select from; empty: the one that the predictions go to.",
    )
    sample_size: int | None = Field(
        default=None, ge=1, title="Sample size", description="How many rows are drawn; empty: all."
    )
    random_seed: int = Field(default=0, title="Random seed", description="Another seed draws another sample.")
    pin: bool = Field(
        default=False,
        title="Pin",
        description="Use the snapshot of the first run, so that later changes of the table do not count.",
    )

    @field_validator("identifier")
    @classmethod
    def _table_name(cls, value: str) -> str:
        check_name("the data set's identifier", value)
        return value

    @field_validator("db")
    @classmethod
    def _no_url(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(
                "db takes the name of a saved Datalayer; a URL would be stored in plain text. Save it first: "
                "Datalayer(url=...).save(NAME)"
            )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if [self.select, self.raw_data, self.reference].count(None) != 2:
            raise ValueError(
                f"dataset {self.identifier!r} needs exactly one of select, raw_data and reference"
            )
        if self.db is not None and self.select is None:
            raise ValueError(f"dataset {self.identifier!r} has a db to select from, but no select")
        return self
