"""Fields of blocks: their input without Prefect's additions, and errors that do not show it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from prefect.blocks.core import schema_extra
from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails

T = TypeVar("T")


def _with_slug(schema: dict[str, Any], block: Any) -> None:
    """Extend a block's schema as Prefect does, and allow the slug that Prefect adds to a block's fields.

    Else Prefect's server refuses a flow run that has a block in its parameters. As a pattern it is not a
    field of the form.
    """
    schema_extra(schema, block)
    schema["patternProperties"] = {"^block_type_slug$": {}}


OF_BLOCK = ConfigDict(extra="forbid", json_schema_extra=_with_slug)
"""Each block sets this itself, since its last base class, Block, would allow unknown fields."""


def not_masked(field: str, text: object) -> None:
    """Raise ValueError for a text of asterisks, as Prefect displays a secret and sends one in parameters."""
    if isinstance(text, str) and re.fullmatch(r"\*{3,}", text.strip()):
        raise ValueError(
            f"{field} is {text!r}, which stands for a secret and is none: parameters of flow runs carry no "
            "secrets, so save the block with its method save(NAME), and give the reference "
            "{'$ref': {'block_document_slug': 'TYPE/NAME'}} in its place, such as 'vllm-api/NAME'"
        )


def own_fields(data: Any) -> Any:
    """Remove the slug that Prefect adds to a block stored inside another one.

    Args:
        data: The block's fields, or any other input, which is returned unchanged.

    Returns:
        The block's own fields.
    """
    if not isinstance(data, Mapping):
        return data
    return {name: value for name, value in data.items() if name != "block_type_slug"}


def not_shown(error: ErrorDetails) -> InitErrorDetails:
    """Hide the value in an error of pydantic.

    Args:
        error: One error of a `ValidationError`.

    Returns:
        The same error, with `(not shown)` as its input.
    """
    return InitErrorDetails(
        type=error["type"], loc=error["loc"], input="(not shown)", ctx=error.get("ctx", {})
    )


def validated(
    data: Any, handler: ModelWrapValidatorHandler[T], hide: Callable[[ErrorDetails], InitErrorDetails]
) -> T:
    """Validate `data`, with errors that hide the input as `hide` does.

    Args:
        data: The input.
        handler: Pydantic's own validation.
        hide: Returns an error of pydantic without the parts that must not be displayed.

    Returns:
        The validated object.

    Raises:
        ValidationError: The input is invalid.
    """
    try:
        return handler(data)
    except ValidationError as error:
        raise ValidationError.from_exception_data(error.title, [hide(e) for e in error.errors()]) from None
    except TypeError as error:  # of an `__init__`, for a field by a number, as YAML may have it
        if str(error) != "keywords must be strings":
            raise
        words = {"error": ValueError("the name of a field is no text")}
        detail = InitErrorDetails(type="value_error", loc=(), input="(not shown)", ctx=words)
        raise ValidationError.from_exception_data("fields", [detail]) from None
