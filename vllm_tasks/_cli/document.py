"""The text of a job file: YAML 1.2, where `no` is a text and `1e-3` a number, and nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from vllm_tasks.errors import InvalidCall

MOST_VALUES = 1_000_000
"""Values of a job file. Ten lines with aliases can stand for billions."""
MOST_MERGED = 10_000
"""Keys that one `<<` merges."""
DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
MERGE = "tag:yaml.org,2002:merge"
"""The tag of the key `<<`."""


def mapping_in(file: Path) -> dict[str, Any]:
    """The mapping that a file holds, in UTF-8, or in UTF-16 with its mark.

    Raises:
        InvalidCall: The file cannot be read, is not YAML, is not a mapping, or has a key twice.
    """
    reader = YAML(typ="safe", pure=True)  # the C parser knows YAML 1.1 only
    reader.Constructor = Constructor
    try:
        found = reader.load(file)  # as a file: of a text, errors would show the line, with the key in it
    except OSError as error:
        raise InvalidCall(f"the job file cannot be read: {error}") from error
    except InvalidCall as error:
        raise InvalidCall(f"{file}, {error}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise InvalidCall(f"{file} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InvalidCall(f"{file} must be a mapping of parameters to values, such as `select: tickets`")
    if _values(found) > MOST_VALUES:
        raise InvalidCall(
            f"{file} has more than {MOST_VALUES:,} values where its aliases (*name) are written out, or an "
            "alias inside of what it stands for: write fewer, and keep rows in a table"
        )
    return found


def _values(found: Any) -> int:
    """The number of values, each alias counted in full; at most one more than `MOST_VALUES`."""
    left, seen = [found], 0
    while left and seen <= MOST_VALUES:
        value = left.pop()
        seen += 1
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return seen


class Constructor(SafeConstructor):
    """Values as YAML 1.2 reads them, without a key that is there twice and numbers that may be texts."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """The library's own check shows both values, secrets among them, and skips mappings with `<<`."""
        seen: set[tuple[str | None, Any]] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise InvalidCall(
                        f"line {key.start_mark.line + 1}: the key {key.value!r:.100} is there twice; remove "
                        "one of them"
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> Any:
        """A `<<` that merges a list of aliases, and is merged itself, would stand for billions of keys."""
        for key, value in node.value:
            if key.tag == MERGE and isinstance(value, SequenceNode):
                merged = [each for each in value.value if isinstance(each, MappingNode)]
                for each in merged:
                    self.flatten_mapping(each)
                if sum(len(each.value) for each in merged) > MOST_MERGED:
                    raise InvalidCall(
                        f"line {key.start_mark.line + 1}: << merges more than {MOST_MERGED:,} keys; write "
                        "them out, or merge fewer mappings"
                    )
        return super().flatten_mapping(node)

    def construct_yaml_int(self, node: Any) -> int:
        """010 is 8 in YAML 1.1 and 10 in 1.2, and 2024_01 is 202401: a person may mean either, or a text."""
        if DECIMAL.fullmatch(node.value) is None:
            number = super().construct_yaml_int(node)
            raise InvalidCall(
                f"line {node.start_mark.line + 1}: {node.value!r:.100} may be a number or a text; write "
                f"{number} for the number, or put it in quotes"
            )
        return super().construct_yaml_int(node)


Constructor.add_constructor("tag:yaml.org,2002:int", Constructor.construct_yaml_int)
