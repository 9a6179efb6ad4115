"""The source of the code that runs, and the names that code uses."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType


@dataclass
class Names:
    """What code names, with the functions inside it."""

    globals: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    imports: list[tuple[str, int, tuple[str, ...]]] = field(default_factory=list)
    """What it imports when it is called: the module, its level, and what of it."""


def names_in(code: CodeType) -> Names:
    names = Names()
    for each in (code, *_inside(code)):
        steps = list(dis.get_instructions(each))
        for i, step in enumerate(steps):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                names.globals.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                names.attributes.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                names.imports.append((step.argval, steps[i - 2].argval, steps[i - 1].argval or ()))
    return names


def source_of(function: FunctionType) -> str | None:
    """The source of a function, without its place; None where it cannot be told which it is.

    A source is known by the code that Python makes of it now: not one that was changed since it was imported,
    nor one of two lambdas in a line.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    return _sources(text, code.co_filename).get(code)


@functools.lru_cache(maxsize=64)
def _sources(text: str, file: str) -> Mapping[CodeType, str]:
    try:
        module, tree = compile(text, file, "exec", dont_inherit=True), ast.parse(text)
    except (SyntaxError, ValueError):
        return {}
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(n.lineno for n in (node, *node.decorator_list))
            found[first, node.name].append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
        elif isinstance(node, ast.Lambda):
            found[node.lineno, "<lambda>"].append(ast.get_source_segment(text, node) or "")
    by_code = {code: found.get((code.co_firstlineno, code.co_name), []) for code in _inside(module)}
    return {code: sources[0] for code, sources in by_code.items() if len(sources) == 1}


def _inside(code: CodeType) -> Iterator[CodeType]:
    for inner in filter(inspect.iscode, code.co_consts):
        yield inner
        yield from _inside(inner)
