"""Where tables live: a lake (a folder or fsspec URL) or a database (a SQLAlchemy URL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, model_validator

LOGO = "https://avatars.githubusercontent.com/u/136984999?s=200"
"""vLLM's."""


def own_fields(data: Any) -> Any:
    """A block's fields: Prefect adds its type's slug to a block that it stores inside another one."""
    if not isinstance(data, Mapping):
        return data
    return {name: value for name, value in data.items() if name != "block_type_slug"}


class Datalayer(Block):
    """The address of tables. Kept and saved with a model; predicting over tables comes later."""

    _block_type_name = "vLLM Datalayer"
    _block_type_slug = "vllm-datalayer"
    _description = "Tables for vLLM predictions: a folder, an fsspec URL or a SQLAlchemy URL."

    _logo_url: ClassVar[Any] = LOGO
    _documentation_url: ClassVar[Any] = "https://docs.sqlalchemy.org/en/20/core/engines.html"
    _code_example = """
        from vllm_tasks import Datalayer

        db = Datalayer.load("BLOCK_NAME")
        """

    model_config = ConfigDict(extra="forbid")

    url: SecretStr = Field(
        description="A folder, an fsspec URL or a SQLAlchemy URL. Kept secret, as it may hold a password."
    )

    @model_validator(mode="before")
    @classmethod
    def _own_fields(cls, data: Any) -> Any:
        return own_fields(data)
