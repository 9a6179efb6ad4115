"""Identifies a function for the fingerprint: equal in every process, different if its results may differ.

A function counts by its source, its defaults and annotations, its closure, its attributes (`__wrapped__` is
one) and the globals that its code names. The user's functions, classes and modules among these count in the
same way, objects by what they would be pickled by, the path of a file by its name and contents. Installed
code counts by its name, unless it belongs to the function's own package. Location and layout of code do not
count. A function that cannot be identified in this way is refused; a declared `version` then replaces its
contents.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import pkgutil
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import (
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, ForwardRef, Never, NewType, ParamSpec, TypeVar, TypeVarTuple

from vllm_tasks.calls.source_code import Names, names_in, source_of
from vllm_tasks.calls.weights import hash_of_file
from vllm_tasks.errors import InvalidCall

MOST = 100_000
"""The largest number of values, apart from texts, that a function may hold."""
CHANGING = Iterator, io.IOBase, random.Random, type(os.environ)
"""Types of objects that change with each use, or differ in each process."""
CHANGING_ELSEWHERE = {
    "numpy.random._generator.Generator",
    "numpy.random.mtrand.RandomState",
    "torch._C.Generator",
}
"""The same, of packages that may not be installed."""
LOGS = logging.Logger, logging.LoggerAdapter, logging.Handler
BY_CODE = {"eval", "exec", "globals", "__import__"}
"""Built-in functions that reach objects that the code does not name, as `import_module` does."""
LOCATION = {"__name__", "__module__", "__package__", "__spec__", "__loader__", "__file__"}
"""The location of a function, which differs between a script and a deployment."""
DERIVED = LOCATION | {
    *("__dict__", "__weakref__", "__parameters__", "__annotate_func__", "__annotations_cache__"),
    *("__firstlineno__", "__static_attributes__", "_abc_impl", "__dataclass_params__", "__signature__"),
    "__slotnames__",
}
"""Members of a class that give its location or are derived from its other members."""
INSTALLED = {"site-packages", "dist-packages"}
OF_C = MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType
TYPE_VARIABLES = TypeVar, TypeVarTuple, ParamSpec, NewType
MADE_IN_PYTHON = 1 << 9
"""The flag of types that were created at run time (`Py_TPFLAGS_HEAPTYPE`)."""
WAY_OUT = (
    "declare its version, such as `f.version = '1'`, and change it whenever its answers may change (for an "
    "object, on its class; if it takes no attribute, call it from a function of your own)"
)


def made_of(function: Any, role: str) -> Any:
    """Return what determines the results of `function`, or a value that one is called with: its declared
    `version` if it has one, else a hash of its contents.

    `role` is its purpose, for errors. Raises `InvalidCall` if the contents cannot be determined.
    """
    if function is None:
        return None
    reader = _Reader(role)
    try:
        name = _path(function)
        reader.package = name.partition(".")[0]
        if version := _declared(function):
            return version
        parts = json.dumps(reader.read(function, name), ensure_ascii=False)
    except InvalidCall:
        raise
    except RecursionError:
        raise InvalidCall(f"{role} is nested too deeply to be read: {WAY_OUT}") from None
    except Exception as error:  # noqa: BLE001 - the user's classes and modules may raise anything
        reader.refuse(f"cannot be read ({type(error).__name__}: {error!s:.100})")
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()


def _declared(function: Any) -> Any:
    version = getattr(function, "version", None)
    if not isinstance(version, str | int):
        return None
    if version == getattr(getattr(function, "__wrapped__", None), "version", None):
        return None  # `functools.wraps` copied it from another function
    return {"function": _path(function), "version": version}


class _Reader:
    """Reads one function and everything that it holds."""

    def __init__(self, role: str) -> None:
        self.role, self.left = role, MOST
        self.package = ""
        """The function's package, whose code counts by its contents even if it is installed."""
        self.numbers: dict[int, tuple[int, Any]] = {}
        """Numbers of the objects that may hold themselves, by id. An object kept here keeps its id."""
        self.trail: list[str] = []
        """The names that lead from the function to the value that is being read, for errors."""

    def refuse(self, why: str) -> Never:
        path = " > ".join(f"{n:.50}" for n in self.trail) or "given"
        raise InvalidCall(f"{self.role} {path} {why}: {WAY_OUT}")

    def read(self, value: Any, name: str | None = None) -> Any:
        """Return JSON that is equal for equal values only; `name` is the value's name in errors."""
        if value is None or type(value) in (bool, str):
            return value
        self.left -= 1
        if self.left < 0:
            self.refuse(f"holds more than {MOST:,} values")
        if type(value).__module__ == "typing":
            pass  # `Optional[int]`, for example: whether two are one object depends on a cache of Python
        elif isinstance(value, list | dict | set | bytearray) or hasattr(value, "__dict__"):
            if id(value) in self.numbers:
                return ["again", self.numbers[id(value)][0]]
            self.numbers[id(value)] = len(self.numbers), value
        if name is None:
            return self._read(value)
        self.trail.append(name)
        known = self._read(value)
        self.trail.pop()
        return known

    def _read(self, value: Any) -> Any:
        kind = type(value)
        if parts_of := PARTS.get(kind):
            return [kind.__name__, parts_of(self, value)]
        if isinstance(value, type):
            return self._installed(value, value.__qualname__) or self._class(value)
        if isinstance(value, ModuleType):
            return self.module(value, "", Names(), {})
        return ["log"] if isinstance(value, LOGS) else self._object(value)

    def all(self, values: Iterable[Any]) -> list[Any]:
        return [self.read(value) for value in values]

    def pairs(self, values: Mapping[Any, Any]) -> list[Any]:
        """Read the pairs in their order, since functions may depend on it."""
        return [[self.read(k), self.read(v, k if type(k) is str else None)] for k, v in list(values.items())]

    def unordered(self, values: Iterable[Any]) -> list[str]:
        """Read each value as if none of the others had been read, so that their order does not matter."""
        before, known = self.numbers, []
        for value in values:
            self.numbers = dict(before)
            known.append(json.dumps(self.read(value)))
        self.numbers = before
        return sorted(known)

    def _installed(self, value: Any, name: str) -> Any:
        """Return the name of installed or built-in code, or None if the value must be read itself."""
        module = _module_of(value)
        if isinstance(value, type) and not value.__flags__ & MADE_IN_PYTHON:
            return ["installed", f"{module}.{name}"]
        if _is_installed(module, self.package):
            with suppress(AttributeError, ImportError, ValueError):
                if pkgutil.resolve_name(f"{module}:{name}") is value:
                    return ["installed", f"{module}.{name}"]
        return None

    # ------------------------------------------------------------------ functions

    def function(self, function: FunctionType) -> Any:
        known = self._installed(function, function.__qualname__) or _declared(function)
        if known:
            return known
        held, names = self._held(function)
        copied = getattr(vars(function).get("__wrapped__"), "__doc__", None)
        return {
            "function": function.__qualname__,
            "code": source_of(function) or self.bytecode(function.__code__),
            "doc": None if function.__doc__ == copied else function.__doc__,
            "defaults": self.read([function.__defaults__, function.__kwdefaults__], "its defaults"),
            "attributes": {n: self.read(v, n) for n, v in sorted(vars(function).items())},
            "holds": self._named(held, names, {}),
        }

    def _held(self, function: FunctionType) -> tuple[dict[str, Any], Names]:
        """Return the closure of a function and, if it is not installed, what it names; and these names."""
        held = dict[str, Any]()
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # not bound yet
                held[name] = cell.cell_contents
        if _is_installed(_module_of(function), self.package):
            return held, Names()
        names, space = names_in(function.__code__), function.__globals__
        built_in = {n for n in names.globals if n not in space}
        if hidden := built_in & BY_CODE | (names.globals | names.attributes) & {"import_module"}:
            self.refuse(f"calls {min(hidden)}, and what that reaches cannot be determined")
        with suppress(NameError):  # a type that exists for type checkers only
            held["its annotations"] = function.__annotations__
        held |= {f"global {n}": space[n] for n in names.globals - LOCATION - built_in}
        held |= {f"import {m.__name__}": m for m in self._imported(names, space.get("__package__"))}
        return held, names

    def module(self, module: ModuleType, name: str, names: Names, seen: dict[int, int]) -> Any:
        """Return an installed module's name, or of the user's module the members that `names` has; `name` is
        the name of the module in the code."""
        if _is_installed(module.__name__, self.package):
            return ["installed module", module.__name__]
        if not names.attributes or name in names.as_values:
            self.refuse(f"holds the module {module.__name__!r}, and which of it is used cannot be determined")
        if id(module) in seen:
            return ["again", seen[id(module)]]
        seen[id(module)] = len(seen)
        used = names.attributes | {"__getattr__"}
        return self._named({n: v for n, v in list(vars(module).items()) if n in used}, names, seen)

    def _named(self, held: Mapping[str, Any], names: Names, seen: dict[int, int]) -> dict[str, Any]:
        """Read the objects that code has under its names, and the members of modules that it uses."""
        return {
            n: self.module(v, n.rpartition(" ")[2], names, seen)
            if isinstance(v, ModuleType)
            else self.read(v, n)
            for n, v in sorted(held.items())
        }

    def _imported(self, names: Names, package: str | None) -> Iterator[ModuleType]:
        """Import and yield the user's modules that a function would import when it is called."""
        for name, level, wanted in names.imports:
            with suppress(ImportError):
                full = resolve_name("." * level + name, package)
                if _is_installed(full, self.package):
                    continue
                module = importlib.import_module(full)
                for part in wanted:
                    if not hasattr(module, part):
                        importlib.import_module(f"{full}.{part}")
                # `import a.b` binds the name `a`.
                yield module if wanted else sys.modules[full.partition(".")[0]]

    def bytecode(self, code: CodeType) -> list[Any]:
        """Return the bytecode of code without a source; it differs between versions of Python."""
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        return [code.co_code.hex(), code.co_exceptiontable.hex(), self.read(code.co_consts), *names, *counts]

    # ------------------------------------------------------------------ classes and objects

    def _class(self, kind: type) -> Any:
        members = {
            n: self.read(v, n)
            for n, v in sorted(vars(kind).items())
            if n not in DERIVED and (not n.startswith("__pydantic_") or n.endswith("_fields__"))
        }
        if "__dataclass_fields__" in members and str(kind.__doc__).startswith(f"{kind.__name__}("):
            members.pop("__doc__", None)  # Python wrote it, and it may contain an address
        return {
            "class": kind.__qualname__,
            "bases": [self.read(base, "its parent") for base in (*kind.__bases__, type(kind))],
            "members": members,
        }

    def _object(self, value: Any) -> Any:
        """Return what an object would be pickled by, since a copy made of that is as good as the object."""
        kind = type(value)
        if isinstance(value, CHANGING) or _path(kind) in CHANGING_ELSEWHERE:
            self.refuse(f"is a {_path(kind)}, which changes as it is used")
        if isinstance(value, OF_C) and not self._installed(
            value.__objclass__, value.__objclass__.__qualname__
        ):
            self.refuse("is written in C")
        if isinstance(value, Path) and value.is_file():
            return ["file", value.name, hash_of_file(value)]
        if isinstance(value, Path) and value.is_dir():
            self.refuse(f"is the folder {str(value)!r}, and which of its files are read cannot be determined")
        try:
            reducer: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)
            reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        except Exception as error:  # noqa: BLE001 - its class may raise anything
            self.refuse(f"is a {_path(kind)}, whose state cannot be read ({error!s:.100})")
        if isinstance(reduced, str):
            return self._installed(value, reduced) or self.refuse(f"is a {_path(kind)} that cannot be read")
        made_by, arguments, state, items, pairs = [*reduced, None, None, None][:5]
        if isinstance(state, dict):
            members = {n: v for each in reversed(kind.__mro__) for n, v in vars(each).items()}
            made = {n for n, v in members.items() if type(v) is functools.cached_property}
            state = {n: v for n, v in _own(state).items() if n not in made}
        reduced_by: Any = kind.__reduce__
        if reduced_by in (set.__reduce__, frozenset.__reduce__):  # a list in the order of the hashes
            arguments = (frozenset(value),)
        parts = [kind, made_by, arguments, state, list(items or ()), list(pairs or ())]
        return ["object", self.all(parts)]


PARTS: dict[type, Callable[[_Reader, Any], Any]] = {
    int: lambda _, value: hex(value),
    bytes: lambda _, value: hashlib.sha256(value).hexdigest(),
    **dict.fromkeys((float, complex, type(...)), lambda _, value: repr(value)),
    **dict.fromkeys((tuple, list), _Reader.all),
    **dict.fromkeys((dict, MappingProxyType), _Reader.pairs),
    **dict.fromkeys((set, frozenset), _Reader.unordered),
    **dict.fromkeys((staticmethod, classmethod), lambda reader, value: reader.read(value.__func__)),
    FunctionType: _Reader.function,
    CodeType: _Reader.bytecode,
    MethodType: lambda reader, value: [
        reader.read(value.__func__),
        reader.read(value.__self__, "its object"),
    ],
    property: lambda reader, value: reader.all([value.fget, value.fset, value.fdel]),
    functools.cached_property: lambda reader, value: reader.read(value.func),
    functools._lru_cache_wrapper: lambda reader, value: reader.read(_own(vars(value))),
    **dict.fromkeys(TYPE_VARIABLES, lambda _, value: value.__name__),
    ForwardRef: lambda _, value: value.__forward_arg__,
}
"""How values of these types are read. Other objects count by what they would be pickled by."""


def _own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes, except those that `functools.wraps` copied from `__wrapped__`."""
    copied = functools.WRAPPER_ASSIGNMENTS if "__wrapped__" in attributes else ()
    return {n: v for n, v in attributes.items() if n not in copied}


def _module_of(value: Any) -> str:
    """Return the module that an object was defined in, whatever its wrappers say."""
    while isinstance(value, functools.partial | MethodType):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__"))
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _is_installed(module: str, package: str) -> bool:
    """Return whether a module belongs to Python or was installed, and is not part of `package`."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None and module not in sys.modules:
        with suppress(ImportError, ValueError):
            file = getattr(find_spec(top), "origin", None)
    if file in (None, "built-in", "frozen"):
        return top in sys.stdlib_module_names
    if INSTALLED & set(Path(file).parts):
        return top != package
    return top in sys.stdlib_module_names and Path(file).is_relative_to(sysconfig.get_path("stdlib"))


def _path(value: Any) -> str:
    """Return `module.name`; for a module that is run as a script, the name of its file."""
    if isinstance(value, functools.partial):
        return _path(value.func)
    module = str(getattr(value, "__module__", None) or type(value).__module__)
    if module.startswith("__") and (file := getattr(sys.modules.get(module), "__file__", None)):
        module = Path(file).stem
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
