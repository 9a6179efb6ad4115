"""Reads the source of running code, without its layout, and the names that the code uses."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import linecache
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

OF_AN_ATTRIBUTE = "LOAD_ATTR", "LOAD_METHOD"
OF_A_GLOBAL = "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"
LOADS = *OF_AN_ATTRIBUTE, *OF_A_GLOBAL, "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"


@dataclass
class Names:
    """The names that code uses, including those of the functions inside it."""

    globals: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    as_values: set[str] = field(default_factory=set)
    """The globals and attributes that are not only used to read an attribute, but for example passed on."""
    imports: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    """The imports that a call runs: the module, the level of a relative import, and the imported names."""


def names_in(code: CodeType) -> Names:
    names = Names()
    for each in (code, *_inside(code)):
        steps = [step for step in dis.get_instructions(each) if step.opname != "EXTENDED_ARG"]
        for i, step in enumerate(steps):
            if step.opname in (*OF_AN_ATTRIBUTE, "IMPORT_FROM"):
                names.attributes.add(step.argval)
            elif step.opname in OF_A_GLOBAL:
                names.globals.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                names.imports.append((step.argval, steps[i - 2].argval, steps[i - 1].argval or ()))
            if step.opname in LOADS and steps[i + 1].opname not in OF_AN_ATTRIBUTE:
                names.as_values.add(step.argval)
    return names


def source_of(function: FunctionType) -> list[Any] | None:
    """Return the source of a function, part by part; None if it cannot be determined.

    A source counts only if Python compiles it to the function's code. So None is returned if the file has
    changed since the import, and for one of two lambdas in a line.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    found = _sources(text, code.co_filename).get(code)
    return _flattened(found) if found else None


@functools.lru_cache(maxsize=64)
def _sources(text: str, file: str) -> Mapping[CodeType, ast.AST]:
    try:
        module, tree = compile(text, file, "exec", dont_inherit=True), _parsed(text)
    except (SyntaxError, ValueError):
        return {}
    found: dict[tuple[int, str], list[ast.AST]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[min(n.lineno for n in (node, *node.decorator_list)), node.name].append(node)
        elif isinstance(node, ast.Lambda):
            found[node.lineno, "<lambda>"].append(node)
    by_code = {code: found.get((code.co_firstlineno, code.co_name), []) for code in _inside(module)}
    return {code: sources[0] for code, sources in by_code.items() if len(sources) == 1}


def _parsed(text: str) -> ast.Module:
    """Parse the text, again if Python 3.11 mixes up two threads.

    That version counts the depth of all threads' trees in one place, so a thread that takes over in the
    middle of a tree makes it raise `SystemError` for a correct text.
    """
    for _ in range(9):
        with contextlib.suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


def _flattened(node: ast.AST) -> list[Any]:
    """Return the code's parts without positions, layout and comments, and without empty fields, which only
    some versions of Python have. A part gives the number of its parts, so deep code is still a flat list."""
    parts, left = list[Any](), list[Any]([node])
    while left:
        each = left.pop()
        if isinstance(each, ast.AST):
            fields = {n: v for n, v in ast.iter_fields(each) if v not in (None, []) and n != "kind"}
            parts.append([type(each).__name__, *fields])
            left += fields.values()
        elif isinstance(each, list):
            parts.append(len(each))
            left += each
        else:
            parts.append(ascii(each))
    return parts


def _inside(code: CodeType) -> Iterator[CodeType]:
    for inner in filter(inspect.iscode, code.co_consts):
        yield inner
        yield from _inside(inner)
