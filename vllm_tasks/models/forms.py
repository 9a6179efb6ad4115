"""A block's JSON schema as the form in Prefect's UI needs it.

Of a field's alternatives the form picks the first, whatever the default is, and insists on what that one
requires: with a data type or a validation listed before null, no model without them could be made. (Seen with
the UI of Prefect 3.7.7.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NULL = {"type": "null"}
NONE = {**NULL, "title": "none"}

Schema = dict[str, Any]


def arranged(schema: Schema, first: Sequence[str], last: Sequence[str]) -> Schema:
    """The schema of a block with these fields first and last, in this order, and nothing asked twice."""
    fields = schema["properties"]
    between = [name for name in fields if name not in {*first, *last}]
    for position, name in enumerate([*first, *between, *last]):
        fields[name] = {**_simple(fields[name], schema.get("definitions", {})), "position": position}
    return schema


def _simple(field: Schema, definitions: Schema) -> Schema:
    """Null comes first among alternatives; beside a single plain one, or a block, it is an empty field."""
    alternatives = field.get("anyOf", [])
    if NULL not in alternatives:
        return field
    others = [other for other in alternatives if other != NULL]
    if len(others) == 1 and ("type" in others[0] or _is_block(others[0], definitions)):
        return {**others[0], **{key: value for key, value in field.items() if key != "anyOf"}}
    return {**field, "anyOf": [NONE, *others]}


def _is_block(alternative: Schema, definitions: Schema) -> bool:
    return "block_type_slug" in definitions[alternative["$ref"].rpartition("/")[2]]
