"""Structured answers: the JSON Schema that requests require, the check of an answer, and its columns."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import jsonschema  # type: ignore[import-untyped]  # has no type information
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from vllm_tasks.calls.callables import import_callable
from vllm_tasks.calls.datatypes import DEEPEST, OUTPUT, SHOWN, AnswerType, Undecodable, of_text, read_json
from vllm_tasks.calls.functions import made_of
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.errors import is_of_the_row
from vllm_tasks.rows import BuiltinType

Json = dict[str, Any]
BUILTIN_TYPES = get_args(BuiltinType)
SCHEMA_WORDS = {"type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
"""A dict without any of these keywords is not accepted as a JSON Schema."""
KINDS: dict[str, BuiltinType] = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
OF_KIND: dict[BuiltinType, Json] = {
    "str": {"type": "string"},
    "bytes": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "json": {},
}
OTHER_PROPERTIES = {"patternProperties", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"}
"""With any of these keywords, an object may have properties that `properties` does not name."""
COLUMN_NAME = re.compile(r"[^\W_][\w-]*")
LONGEST_NAME = 63
"""Bytes of a column's name; PostgreSQL truncates a longer one."""


def schema_type(given: Json | str, flatten: bool) -> AnswerType:
    """Return the answer type of an `output_schema`; raise ValueError if it is not valid.

    With `flatten`, the answer is a list, and the columns are those of its items. A mapping of columns, or a
    pydantic model of an object, then describes one item. A JSON Schema is used as written.
    """
    if isinstance(given, str):
        return _of_pydantic(given, flatten)
    if given and all(isinstance(kind, str) and kind in BUILTIN_TYPES for kind in given.values()):
        return _of_columns(given, flatten)
    if not SCHEMA_WORDS & given.keys():
        wrong = {name: kind for name, kind in given.items() if kind not in BUILTIN_TYPES}
        raise ValueError(
            f"output_schema {wrong!r:.200} is neither columns with one of the types "
            f"{', '.join(BUILTIN_TYPES)} nor a JSON Schema, as in {{'type': 'object', 'properties': {{...}}}}"
        )
    read = _checked_reader(given)
    columns, by_name = _columns(given, flatten)
    return AnswerType(columns, of_text(read), identity=lambda: given, schema=given, by_name=by_name)


def response_format(schema: Json) -> Json:
    """Return the sampling parameter that requires answers to have `schema`.

    It is OpenAI's form, which other servers and gateways know, too. vLLM 0.26 to 0.33 (read in their source)
    make of it what they make of their own `structured_outputs`.
    """
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


# ---------------------------------------------------------------------- the three forms


def _of_columns(given: Mapping[str, BuiltinType], flatten: bool) -> AnswerType:
    row: Json = {
        "type": "object",
        "properties": {name: dict(OF_KIND[kind]) for name, kind in given.items()},
        "required": list(given),
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": row} if flatten else row
    read = _checked_reader(schema)
    return AnswerType(
        _named(given), of_text(read), identity=lambda: {"columns": given}, schema=schema, by_name=True
    )


def _of_pydantic(path: str, flatten: bool) -> AnswerType:
    found = import_callable(path)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ValueError(f"output_schema {path!r} leads to {found!r}, which is not a pydantic model")
    return _of_class(found, path, flatten)


@functools.lru_cache(maxsize=64)
def _of_class(found: type[BaseModel], path: str, flatten: bool) -> AnswerType:
    try:
        one = found.model_json_schema()
        wrapped = flatten and _resolved(one, one).get("type") == "object"
        answer: TypeAdapter[Any] = TypeAdapter(list[found] if wrapped else found)  # type: ignore[valid-type]
        schema = answer.json_schema()
        stored = answer.json_schema(mode="serialization")
    except PydanticInvalidForJsonSchema as error:
        raise ValueError(f"output_schema {path!r} has no JSON Schema: {error}") from error

    def read(text: str) -> Any:
        read_json(text)
        try:
            value = answer.dump_python(answer.validate_json(text), mode="json", by_alias=True)
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except ValidationError as error:
            raise Undecodable(_first_of(error)) from error
        except BaseException as error:  # the caller's own validators and serializers
            if not is_of_the_row(error):
                raise
            raise Undecodable(f"{path}: {type(error).__name__}: {error}"[:SHOWN]) from error
        return value

    columns, by_name = _columns(stored, flatten)
    return AnswerType(
        columns,
        of_text(read),
        identity=lambda: {"pydantic": made_of(found, "output_schema"), "schema": schema},
        schema=schema,
        by_name=by_name,
    )


def _first_of(error: ValidationError) -> str:
    details = error.errors(include_url=False, include_context=False)
    more = f"; and {len(details) - 1} more" if len(details) > 1 else ""
    location = "".join(f"[{part!r}]" for part in details[0]["loc"])
    return f"does not fit the schema: {location or 'as a whole'}: {details[0]['msg']}"[:SHOWN] + more


def _checked_reader(schema: Json) -> Callable[[str], Any]:
    """Return a reader of JSON that fits `schema`; raise ValueError if this is not a JSON Schema."""
    try:
        return _reader(json.dumps(schema, allow_nan=False))
    except TypeError as error:
        raise ValueError(f"output_schema is not plain data (JSON): {error}") from error
    except RecursionError as error:
        raise ValueError(f"output_schema is nested too deeply: {error}") from error


@functools.lru_cache(maxsize=64)  # each call needs one, and it takes 5 ms to build
def _reader(text: str) -> Callable[[str], Any]:
    schema = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)
    except jsonschema.SchemaError as error:
        raise ValueError(
            f"output_schema is not a valid JSON Schema at {error.json_path}: {error.message}"[: 2 * SHOWN]
        ) from error
    for reference in _references(schema):
        _lookup(schema, reference)
    # Danger: without a registry of its own, the validator would fetch a remote reference over the network.
    validator = kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)

    def read(text: str) -> Any:
        value = read_json(text)
        try:
            wrong = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except (RecursionError, OverflowError) as error:  # a circular schema; `multipleOf` with a huge number
            raise Undecodable(f"cannot be checked: {error}"[:SHOWN]) from error
        if wrong is not None:
            raise Undecodable(f"does not fit the schema at {wrong.json_path}: {wrong.message}"[:SHOWN])
        return value

    return read


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for word, value in schema.items():
            if word in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _lookup(root: Json, reference: str) -> Any:
    resource = Resource.from_contents(root, default_specification=DRAFT202012)
    try:
        return Registry().resolver_with_root(resource).lookup(reference).contents
    except Unresolvable as error:
        raise ValueError(
            f"output_schema refers to {reference!r}, which is not in it; define it under '$defs' and refer "
            "to it as '#/$defs/NAME'"
        ) from error


# ---------------------------------------------------------------------- columns


def _columns(root: Json, flatten: bool) -> tuple[tuple[OutputColumn, ...], bool]:
    """Return a column for each property of an object without other properties, and True; else `output`, and
    False."""
    row = _resolved(root, root)
    if flatten:
        if row.get("type") == "object":
            raise ValueError(
                "flatten needs a list, and output_schema describes an object: write the JSON Schema of the "
                "list, {'type': 'array', 'items': {...}}"
            )
        row = _resolved(root, row.get("items", {})) if row.get("type") == "array" else {}
    properties = row.get("properties")
    closed = not OTHER_PROPERTIES & row.keys() and row.get("additionalProperties", False) is False
    if row.get("type") == "object" and properties and closed:
        return _named({name: _kind(root, value) for name, value in properties.items()}), True
    return (OutputColumn(OUTPUT, _kind(root, row)),), False


def _named(kinds: Mapping[str, BuiltinType]) -> tuple[OutputColumn, ...]:
    seen: dict[str, str] = {}
    for name in kinds:
        if not COLUMN_NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
            raise ValueError(
                f"output_schema has {name!r}, which cannot be a column: a name has letters, digits, '_' and "
                f"'-', begins with a letter or digit, and has at most {LONGEST_NAME} bytes; rename it, or "
                "store the answer in one column: datatype='json' with "
                "predict_kwargs={'structured_outputs': {'json': schema}}"
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise ValueError(
                f"output_schema has {other!r} and {name!r}, which are one column to SQL; rename one of them"
            )
    return tuple(OutputColumn(name, kind) for name, kind in kinds.items())


def _kind(root: Json, schema: Any) -> BuiltinType:
    """Return the column type that holds all values of `schema` except null."""
    found = _kinds(root, schema, {}) - {"null"}
    if found == {"int", "float"}:
        return "float"
    return found.pop() if len(found) == 1 else "json"  # type: ignore[return-value]  # "null" was removed


def _kinds(root: Json, schema: Any, seen: dict[int, Json]) -> set[str]:
    """Return the column types of all values of `schema`. `seen` has the alternatives visited so far, by
    identity, because one that refers to itself would never end."""
    schema = _resolved(root, schema)
    for word in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(word), list):
            if id(schema) in seen:
                return set()
            if len(seen) > DEEPEST:
                return {"json"}
            seen[id(schema)] = schema
            return set().union(*(_kinds(root, option, seen) for option in options))
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        return {"null" if t == "null" else KINDS.get(t, "json") for t in types}
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else [{}]
    return {_kind_of(value) for value in values}


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "json")


def _resolved(root: Json, schema: Any) -> Json:
    """Return `schema`, or the one that it refers to; {} for true, false and circular references."""
    for _ in range(DEEPEST):
        if not isinstance(schema, dict):
            return {}
        if isinstance(reference := schema.get("$ref"), str):
            schema = _lookup(root, reference)
        elif isinstance(parts := schema.get("allOf"), list) and len(parts) == 1 and "type" not in schema:
            schema = parts[0]
        else:
            return schema
    return {}
