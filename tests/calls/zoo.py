"""Functions of many kinds, made from recipes; functions of different recipes return different texts.

A recipe is plain data, a kind and its arguments, so that another process can make the same function.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import enum
import functools
import json
import logging
import operator
import re
import sys
import types
from collections.abc import Callable
from decimal import Decimal
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, field_validator

from vllm_tasks.calls.functions import made_of

T = TypeVar("T")
Prompt = Callable[[str], str]
KINDS: dict[str, Callable[..., Prompt]] = {}
log = logging.getLogger("zoo")


def kind(make: Callable[..., Prompt]) -> Callable[..., Prompt]:
    KINDS[make.__name__] = make
    return make


def build(recipe: Any) -> Prompt:
    """The function of a recipe `[kind, datum, recipe that it builds on or None]`."""
    name, datum, inner = recipe
    return KINDS[name](datum, (lambda x: x) if inner is None else build(inner))


def typed(text: str, name: str = "f", **names: Any) -> Any:
    """A function that was typed in, without a source file."""
    exec(text, names)
    return names[name]


@kind
def closure(datum: Any, inner: Prompt) -> Prompt:
    log.debug("one more")
    return lambda x: f"{datum!r}" + inner(x)


class Words(frozenset[str]):
    """A set of a type of its own: what it is pickled by has an order, which differs between processes."""


@kind
def set_of_a_type(datum: Any, inner: Prompt) -> Prompt:
    words = Words([repr(datum), *"abcdef"])
    return lambda x: "".join(sorted(words)) + inner(x)


@kind
def default(datum: Any, inner: Prompt) -> Prompt:
    return lambda x, datum=datum: f"{datum!r}" + inner(x)


@kind
def keyword_default(datum: Any, inner: Prompt) -> Prompt:
    def f(x: str, *, datum: Any = datum) -> str:
        return f"{datum!r}" + inner(x)

    return f


@kind
def partial(datum: Any, inner: Prompt) -> Prompt:
    return functools.partial(_put, inner, before=datum)


def _put(inner: Prompt, x: str, before: Any) -> str:
    return f"{before!r}" + inner(x)


@kind
def wrapped(datum: Any, inner: Prompt) -> Prompt:
    @functools.wraps(inner)
    def f(x: str) -> str:
        return f"{datum!r}" + inner(x)

    return f


@kind
def cached(datum: Any, inner: Prompt) -> Prompt:
    @functools.lru_cache
    def f(x: str) -> str:
        return f"{datum!r}" + inner(x)

    return f


@kind
def around_a_version(datum: Any, inner: Prompt) -> Prompt:
    @functools.wraps(versioned)
    def f(x: str) -> str:
        return f"{datum!r}" + inner(versioned(x))

    return f


def versioned(x: str) -> str:
    return x


versioned.version = "1"  # type: ignore[attr-defined]


@kind
def attribute(datum: Any, inner: Prompt) -> Prompt:
    def f(x: str) -> str:
        return f"{f.datum!r}" + inner(x)  # type: ignore[attr-defined]

    f.datum = datum  # type: ignore[attr-defined]
    return f


@kind
def recursive(datum: Any, inner: Prompt) -> Prompt:
    def a(x: str) -> str:
        return b(x[1:]) if len(x) > 3 else f"{datum!r}" + inner(x)

    def b(x: str) -> str:
        return a(x[1:]) if len(x) > 3 else f"b{datum!r}" + inner(x)

    return a


@kind
def method(datum: Any, inner: Prompt) -> Prompt:
    return Prompts(datum, inner).make


@kind
def callable_object(datum: Any, inner: Prompt) -> Prompt:
    return Prompts(datum, inner)


class Prompts:
    def __init__(self, datum: Any, inner: Prompt) -> None:
        self.log, self.datum, self.inner, self.me = log, datum, inner, self

    def make(self, x: str) -> str:
        self.log.debug("%s", x)
        return self.shown + self.inner(x)

    __call__ = make

    @functools.cached_property
    def shown(self) -> str:
        return f"{self.datum!r}"


@kind
def of_slots(datum: Any, inner: Prompt) -> Prompt:
    class Slotted:
        __slots__ = "datum", "inner"

        def __call__(self, x: str) -> str:
            return f"{self.datum!r}" + self.inner(x)

    made = Slotted()
    made.datum, made.inner = datum, inner
    return made


@kind
def of_a_dataclass(datum: Any, inner: Prompt) -> Prompt:
    @dataclasses.dataclass(eq=False)
    class Data:
        datum: Any = dataclasses.field(default_factory=lambda: datum)
        held: Prompt = inner

        def __call__(self, x: str) -> str:
            return f"{self.datum!r}" + self.held(x)

    return Data()


@kind
def of_metadata(datum: Any, inner: Prompt) -> Prompt:
    @dataclasses.dataclass
    class Data:
        text: str = dataclasses.field(metadata={"before": datum, "inner": inner})

    def f(x: str) -> str:
        (text,) = dataclasses.fields(Data)
        return f"{text.metadata['before']!r}" + text.metadata["inner"](x)

    return f


@kind
def of_a_docstring(datum: Any, inner: Prompt) -> Prompt:
    made = types.new_class("Data", (), {}, lambda own: own.update(__doc__=f"{datum!r}"))
    described = dataclasses.dataclass(made)
    return lambda x: str(described.__doc__) + inner(x)


@kind
def annotated_class(datum: Any, inner: Prompt) -> Prompt:
    annotations = {"__annotations__": {"text": datum, "inner": inner}}
    return shown(types.new_class("Shape", (), {}, lambda own: own.update(annotations)))


@kind
def annotated_function(datum: Any, inner: Prompt) -> Prompt:
    def tool() -> None: ...

    tool.__annotations__ = {"text": datum, "inner": inner}
    return shown(tool)


def shown(annotated: Any) -> Prompt:
    return lambda x: repr(annotated.__annotations__["text"]) + annotated.__annotations__["inner"](x)


@kind
def of_a_class(datum: Any, inner: Prompt) -> Prompt:
    members = {"datum": datum, "inner": staticmethod(inner)}
    return types.new_class("Child", (Styled,), {}, lambda own: own.update(members))()


class Styled:
    datum: ClassVar[Any] = None
    inner: ClassVar[Prompt] = staticmethod(str)

    @classmethod
    def style(cls) -> str:
        return f"{cls.datum!r}"

    @property
    def said(self) -> str:
        return self.style()

    def __call__(self, x: str) -> str:
        return self.said + self.inner(x)


@kind
def of_a_parent(datum: Any, inner: Prompt) -> Prompt:
    class Parent:
        def __call__(self, x: str) -> str:
            return f"{datum!r}" + inner(x)

    class Child(Parent):
        def __call__(self, x: str) -> str:
            return super().__call__(x)

    return Child()


@kind
def of_a_metaclass(datum: Any, inner: Prompt) -> Prompt:
    class Meta(type):
        def said(cls) -> str:
            return f"{datum!r}"

    class Own(metaclass=Meta):
        def __call__(self, x: str) -> str:
            return type(self).said() + inner(x)

    return Own()


@kind
def of_a_registry(datum: Any, inner: Prompt) -> Prompt:
    known = {"a": lambda x: f"{datum!r}" + inner(x), "b": lambda x: "b" + inner(x)}
    return lambda x: known["a"](x)


@kind
def decorated(datum: Any, inner: Prompt) -> Prompt:
    class Decorated:
        def __init__(self, function: Prompt) -> None:
            functools.update_wrapper(self, function)
            self.function = function

        def __call__(self, x: str) -> str:
            return f"{datum!r}" + self.function(x)

    return Decorated(inner)


@kind
def global_name(datum: Any, inner: Prompt) -> Prompt:
    return typed("def f(x): return repr(DATUM) + inner(x)", DATUM=datum, inner=inner)


@kind
def global_module(datum: Any, inner: Prompt) -> Prompt:
    module = types.ModuleType("of_the_user")
    module.DATUM, module.inner, module.other = datum, inner, object()
    return typed("def f(x): return repr(m.DATUM) + m.inner(x)", m=module)


@kind
def lazy_module(datum: Any, inner: Prompt) -> Prompt:
    module = types.ModuleType("of_the_user")
    module.__getattr__ = lambda name: inner if name == "inner" else datum  # type: ignore[method-assign]
    return typed("def f(x): return repr(m.LAZY) + m.inner(x)", m=module)


@kind
def generic(datum: Any, inner: Prompt) -> Prompt:
    class Child(Named[Literal[repr(datum)]]):  # type: ignore[valid-type, misc]
        held = staticmethod(inner)

    return lambda x: str(get_args(Child.__orig_bases__[0])) + Child.held(x)  # type: ignore[attr-defined]


class Named(Generic[T]):
    text: T


@kind
def source(datum: Any, inner: Prompt) -> Prompt:
    return typed(f"def f(x): return repr({datum!r}) + [(lambda y: inner(y))(z) for z in [x]][0]", inner=inner)


@kind
def two_in_a_line(datum: Any, inner: Prompt) -> Prompt:
    one, other = lambda x: "one" + inner(x), lambda x: "other" + inner(x)
    return one if len(repr(datum)) % 2 else other


@kind
def a_dict_method(datum: Any, inner: Prompt) -> Prompt:
    get = {"x": f"{datum!r}"}.get
    return lambda x: get("x", "") + inner(x)


@kind
def a_text_method(datum: Any, inner: Prompt) -> Prompt:
    form = (str(datum).replace("{", "").replace("}", "") + " {}").format
    return lambda x: form(inner(x))


@kind
def values(datum: Any, inner: Prompt) -> Prompt:
    class Tone(enum.Enum):
        OF = f"{datum!r}"

    Pair = collections.namedtuple("Pair", "first second")
    held = [
        Pair(Decimal("1.50"), re.compile("a+")), collections.deque([1]), collections.Counter("aab"),
        collections.defaultdict(list, a=[1]), operator.itemgetter(0), Tone.OF, {"a", "b", "c"},
        frozenset({1, None}), types.SimpleNamespace(a=1), range(3), 1j, b"\x00", float("nan"), Tone, Pair,
        list[int], int | None,
    ]  # fmt: skip
    return lambda x: held[5].value + inner(x)


@kind
def validated(datum: Any, inner: Prompt) -> Prompt:
    class Ticket(BaseModel):
        text: str = Field(default=f"{datum!r}", max_length=10_000)

        @field_validator("text", mode="before")
        @classmethod
        def _put(cls, value: str) -> str:
            return inner(value)

    return lambda x: Ticket().text + Ticket(text=x).text


def told(recipes: list[Any]) -> list[Any]:
    return [made_of(build(recipe), "prompt_func") for recipe in recipes]


if __name__ == "__main__":
    from tests.calls import zoo  # not as a program: the same functions

    print(json.dumps(zoo.told(ast.literal_eval(sys.stdin.read()))))
