"""Fields of blocks: their input without Prefect's additions, and errors that do not show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ModelWrapValidatorHandler, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails

T = TypeVar("T")


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
