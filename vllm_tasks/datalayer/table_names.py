"""Names of tables: those that are safe in every kind of store, and the names of outputs tables."""

from __future__ import annotations

from vllm_tasks.errors import InvalidCall

OUTPUTS = "_outputs__"
"""Prefix of the name of every outputs table."""
REVIEWS = "_reviews__"
"""Prefix of the name of a table of people's answers."""
ODD = """/\\:*?"<>|#%[]^`"""
"""Characters that would name another place, or that a URL, Delta or a shell would alter."""

LONGEST = 200
"""Bytes of a name; with its prefix it must fit into a folder's name, which may have 255."""


def outputs_name(predict_id: str) -> str:
    """The name of the outputs table of `predict_id`.

    Args:
        predict_id: The name that the call gives its outputs.

    Returns:
        `_outputs__<predict_id>`.

    Raises:
        InvalidCall: It cannot name a folder or a table.
    """
    check_name("predict_id", predict_id)
    return OUTPUTS + predict_id


def reviews_name(predict_id: str) -> str:
    """The name of the table of people's answers to outputs.

    Args:
        predict_id: The name that the call gives its outputs, or the name of their table.

    Returns:
        `_reviews__<predict_id>`.
    """
    return REVIEWS + predict_id


def check_name(what: str, name: object) -> None:
    """Refuse a name that would leave the lake's folder, or that a URL, Delta or a database would alter.

    Args:
        what: The argument's name, for the message.
        name: The name to check.

    Raises:
        InvalidCall: The name cannot be used.
    """
    if (
        not isinstance(name, str)
        or not name
        or name != name.strip(" .")
        or not name.isprintable()
        or set(ODD) & set(name)
        or len(name.encode()) > LONGEST
    ):
        raise InvalidCall(
            f"{what}={name!r:.200} cannot name a table: it must be a printable text that is not empty, does "
            f"not begin or end with a space or a dot, has at most {LONGEST} bytes, and contains none of {ODD}"
        )
