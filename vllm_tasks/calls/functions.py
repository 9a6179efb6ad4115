"""What a function is made of: the same in every process, another for one that may answer otherwise.

A function counts by its source, its defaults and annotations, what it closes over, its attributes
(`__wrapped__` is one) and the globals that its code names. Functions, classes and modules of the user's among
these count in the same way, objects by what they would be pickled by, the path of a file by its name and
contents. What is installed counts by its name, unless it is of the function's own package. Where anything
stands, and how it is laid out, does not count. What none of this tells is refused; a declared `version`
speaks for it.
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
"""Values beside texts that a function may hold."""
CHANGING = Iterator, io.IOBase, random.Random, type(os.environ)
"""What is another thing after each use, or in each process."""
LOGS = logging.Logger, logging.LoggerAdapter, logging.Handler
BY_CODE = {"eval", "exec", "globals", "__import__"}
"""Built-in functions that reach what the code does not name, as `import_module` does."""
PLACES = {"__name__", "__module__", "__package__", "__spec__", "__loader__", "__file__"}
"""Where a function stands, which is elsewhere in a script and in a deployment."""
DERIVED = PLACES | {
    *("__dict__", "__weakref__", "__parameters__", "__annotate_func__", "__annotations_cache__"),
    *("__firstlineno__", "__static_attributes__", "_abc_impl", "__dataclass_params__", "__signature__"),
    "__slotnames__",
}
"""Members of a class: where it stands, and what is made of its other members."""
INSTALLED = {"site-packages", "dist-packages"}
OF_C = MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType
TYPE_VARIABLES = TypeVar, TypeVarTuple, ParamSpec, NewType
MADE_IN_PYTHON = 1 << 9
"""The flag of types that were made at run time (Py_TPFLAGS_HEAPTYPE)."""
WAY_OUT = (
    "declare its version, such as `f.version = '1'`, and another one whenever its answers may change (on the "
    "class of an object; what takes no attribute can be called by a function of yours)"
)


def made_of(function: Any, role: str) -> Any:
    """What decides what `function`, or what one is called with, gives; its declared `version` alone, where it
    has one.

    `role` says in errors what it is for. Raises `InvalidCall` where that cannot be told.
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
        raise InvalidCall(f"{role} is nested too deep to be told: {WAY_OUT}") from None
    except Exception as error:  # noqa: BLE001 - whatever the classes and modules of the user raise
        reader.refuse(f"cannot be told ({type(error).__name__}: {error!s:.100})")
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()


def _declared(function: Any) -> Any:
    version = getattr(function, "version", None)
    if not isinstance(version, str | int):
        return None
    if version == getattr(getattr(function, "__wrapped__", None), "version", None):
        return None  # `functools.wraps` has copied it
    return {"function": _path(function), "version": version}


class _Reader:
    """Reads one function, and all that it holds."""

    def __init__(self, role: str) -> None:
        self.role, self.left = role, MOST
        self.package = ""
        """That of the function, which counts by its contents wherever it is installed."""
        self.numbers: dict[int, tuple[int, Any]] = {}
        """Of what may hold itself: by its id, which it keeps as long as it is in here."""
        self.trail: list[str] = []

    def refuse(self, why: str) -> Never:
        place = " > ".join(f"{n:.50}" for n in self.trail) or "given"
        raise InvalidCall(f"{self.role} {place} {why}: {WAY_OUT}")

    def read(self, value: Any, name: str | None = None) -> Any:
        """Equal for equal values only; `name` leads to the value, in errors."""
        if value is None or type(value) in (bool, str):
            return value
        self.left -= 1
        if self.left < 0:
            self.refuse(f"holds more than {MOST:,} values")
        if type(value).__module__ == "typing":
            pass  # such as `Optional[int]`, which is one object or several, as a cache of Python's has it
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
        """In their order, which functions may use."""
        return [[self.read(k), self.read(v, k if type(k) is str else None)] for k, v in list(values.items())]

    def unordered(self, values: Iterable[Any]) -> list[str]:
        """Each as if none of the others had been read."""
        before, known = self.numbers, []
        for value in values:
            self.numbers = dict(before)
            known.append(json.dumps(self.read(value)))
        self.numbers = before
        return sorted(known)

    def _installed(self, value: Any, name: str) -> Any:
        """By its name, if that is all that there is to it."""
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
        """What a function closes over, and what it names if it is not installed; with these names."""
        held = dict[str, Any]()
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # not bound yet
                held[name] = cell.cell_contents
        if _is_installed(_module_of(function), self.package):
            return held, Names()
        names, space = names_in(function.__code__), function.__globals__
        built_in = {n for n in names.globals if n not in space}
        if hidden := built_in & BY_CODE | (names.globals | names.attributes) & {"import_module"}:
            self.refuse(f"calls {min(hidden)}, and what that reaches cannot be told")
        with suppress(NameError):  # of a type that is there for type checkers alone
            held["its annotations"] = function.__annotations__
        held |= {f"global {n}": space[n] for n in names.globals - PLACES - built_in}
        held |= {f"import {m.__name__}": m for m in self._imported(names, space.get("__package__"))}
        return held, names

    def module(self, module: ModuleType, name: str, names: Names, seen: dict[int, int]) -> Any:
        """An installed one by its name, one of the user's by what `names` has of it; `name` is how code names
        the module itself."""
        if _is_installed(module.__name__, self.package):
            return ["installed module", module.__name__]
        if not names.attributes or name in names.whole:
            self.refuse(f"holds the module {module.__name__!r}, and what it uses of that cannot be told")
        if id(module) in seen:
            return ["again", seen[id(module)]]
        seen[id(module)] = len(seen)
        used = names.attributes | {"__getattr__"}
        return self._named({n: v for n, v in list(vars(module).items()) if n in used}, names, seen)

    def _named(self, held: Mapping[str, Any], names: Names, seen: dict[int, int]) -> dict[str, Any]:
        """What code has under names of its own, with what it uses of modules."""
        return {
            n: self.module(v, n.rpartition(" ")[2], names, seen)
            if isinstance(v, ModuleType)
            else self.read(v, n)
            for n, v in sorted(held.items())
        }

    def _imported(self, names: Names, package: str | None) -> Iterator[ModuleType]:
        """The user's modules that a function would import when it is called."""
        for name, level, wanted in names.imports:
            with suppress(ImportError):
                full = resolve_name("." * level + name, package)
                if _is_installed(full, self.package):
                    continue
                module = importlib.import_module(full)
                for part in wanted:
                    if not hasattr(module, part):
                        importlib.import_module(f"{full}.{part}")
                # `import a.b` gives a name to `a`.
                yield module if wanted else sys.modules[full.partition(".")[0]]

    def bytecode(self, code: CodeType) -> list[Any]:
        """For code whose source is not there; another one in another version of Python."""
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
            members.pop("__doc__", None)  # Python's own, in which may be an address
        return {
            "class": kind.__qualname__,
            "bases": [self.read(base, "its parent") for base in (*kind.__bases__, type(kind))],
            "members": members,
        }

    def _object(self, value: Any) -> Any:
        """By what it would be pickled by: what is made of that is as good as it."""
        kind = type(value)
        if isinstance(value, CHANGING):
            self.refuse(f"is a {_path(kind)}, which changes as it is used")
        if isinstance(value, OF_C) and not self._installed(
            value.__objclass__, value.__objclass__.__qualname__
        ):
            self.refuse("is made in C")
        if isinstance(value, Path) and value.is_file():
            return ["file", value.name, hash_of_file(value)]
        if isinstance(value, Path) and value.is_dir():
            self.refuse(f"is the folder {str(value)!r}, and which of its files are read cannot be told")
        try:
            reducer: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)
            reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        except Exception as error:  # noqa: BLE001 - whatever its class raises
            self.refuse(f"is a {_path(kind)}, whose state cannot be told ({error!s:.100})")
        if isinstance(reduced, str):
            return self._installed(value, reduced) or self.refuse(f"is a {_path(kind)} that cannot be told")
        made_by, arguments, state, items, pairs = [*reduced, None, None, None][:5]
        if isinstance(state, dict):
            members = {n: v for each in reversed(kind.__mro__) for n, v in vars(each).items()}
            made = {n for n, v in members.items() if type(v) is functools.cached_property}
            state = {n: v for n, v in _own(state).items() if n not in made}
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
"""What kinds of things are made of; another thing is what it would be pickled by."""


def _own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes but for those that `functools.wraps` copies from `__wrapped__`, such as the module."""
    copied = functools.WRAPPER_ASSIGNMENTS if "__wrapped__" in attributes else ()
    return {n: v for n, v in attributes.items() if n not in copied}


def _module_of(value: Any) -> str:
    """The module that something was defined in, whatever wrappers say."""
    while isinstance(value, functools.partial | MethodType):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__"))
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _is_installed(module: str, package: str) -> bool:
    """Whether a module is Python's or was installed, and is not of `package`."""
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
    """`module.name`; a module that is run, and not imported, by its file."""
    if isinstance(value, functools.partial):
        return _path(value.func)
    module = str(getattr(value, "__module__", None) or type(value).__module__)
    if module.startswith("__") and (file := getattr(sys.modules.get(module), "__file__", None)):
        module = Path(file).stem
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
