"""The source of the code that runs, without its layout, and the names that code uses."""

from __future__ import annotations

import ast
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
    """What code names, with the functions inside it."""

    globals: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    """Of both, what is used otherwise than for an attribute: handed on, say."""
    imports: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    """What it imports when it is called: the module, its level, and what of it."""


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
                names.whole.add(step.argval)
    return names


def source_of(function: FunctionType) -> list[Any] | None:
    """The source of a function, part by part; None where it cannot be told which it is.

    A source is known by the code that Python makes of it now: not one that was changed since it was imported,
    nor one of two lambdas in a line.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    found = _sources(text, code.co_filename).get(code)
    return _told(found) if found else None


@functools.lru_cache(maxsize=64)
def _sources(text: str, file: str) -> Mapping[CodeType, ast.AST]:
    try:
        module, tree = compile(text, file, "exec", dont_inherit=True), ast.parse(text)
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


def _told(node: ast.AST) -> list[Any]:
    """What is written and not how: neither places, layout and comments, nor what a version of Python has no
    word for. Each part tells how many follow for it, so that deep code is no deep list."""
    told, left = list[Any](), list[Any]([node])
    while left:
        each = left.pop()
        if isinstance(each, ast.AST):
            fields = {n: v for n, v in ast.iter_fields(each) if v not in (None, []) and n != "kind"}
            told.append([type(each).__name__, *fields])
            left += fields.values()
        elif isinstance(each, list):
            told.append(len(each))
            left += each
        else:
            told.append(ascii(each))
    return told


def _inside(code: CodeType) -> Iterator[CodeType]:
    for inner in filter(inspect.iscode, code.co_consts):
        yield inner
        yield from _inside(inner)
