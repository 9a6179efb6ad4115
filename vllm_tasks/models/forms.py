"""A block's JSON schema as the form in Prefect's UI needs it.

If a field has alternatives, the form selects the first one, whatever the default is, and insists on what it
requires. If a data type or a validation were listed before null, the form could make no model without them.
(Observed in the UI of Prefect 3.7.7.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NULL = {"type": "null"}
NONE = {**NULL, "title": "none"}

Schema = dict[str, Any]


def arranged(schema: Schema, first: Sequence[str], last: Sequence[str]) -> Schema:
    """Arrange a block's schema for the form.

    Args:
        schema: The schema; it is changed in place.
        first: Names of the fields at the head of the form, in this order.
        last: Names of the fields at its end, in this order.

    Returns:
        `schema`, in which null comes first among the alternatives of each field.
    """
    fields = schema["properties"]
    between = [name for name in fields if name not in {*first, *last}]
    for position, name in enumerate([*first, *between, *last]):
        fields[name] = {**_simple(fields[name], schema.get("definitions", {})), "position": position}
    return schema


def _simple(field: Schema, definitions: Schema) -> Schema:
    """`field` with null as its first alternative; null and one plain type or block become one empty field."""
    alternatives = field.get("anyOf", [])
    if NULL not in alternatives:
        return field
    others = [other for other in alternatives if other != NULL]
    if len(others) == 1 and ("type" in others[0] or _is_block(others[0], definitions)):
        return {**others[0], **{key: value for key, value in field.items() if key != "anyOf"}}
    return {**field, "anyOf": [NONE, *others]}


def _is_block(alternative: Schema, definitions: Schema) -> bool:
    return "block_type_slug" in definitions[alternative["$ref"].rpartition("/")[2]]
