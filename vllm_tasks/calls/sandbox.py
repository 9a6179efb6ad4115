"""The sandbox of prompt files: what a template may call, and how much it may do for one row.

Jinja's own sandbox refuses private attributes, changes of values and long ranges. This one bounds the rest of
what a row could make large: loops in loops, `{{ text * n }}`, `{{ text | indent(n) }}`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from time import thread_time
from typing import Any
from uuid import UUID

from jinja2 import StrictUndefined, Undefined, nodes, pass_environment
from jinja2.environment import Environment
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from vllm_tasks.calls.plain_text import plain_text
from vllm_tasks.calls.template import BadRow

SECONDS = 5.0
"""Seconds of CPU that a template may take for one row. They are counted where a loop turns, and where a
function or a filter is called."""
LARGEST_NUMBER = 10_000
"""The largest width, precision or number of parts that a filter or a method takes."""
MOST_BITS = 1_000_000
"""Bits of a whole number."""
RANDOM = {"filters": ("random",), "globals": ("lipsum",)}
"""Names of Jinja's that would make another prompt of the same row each time."""
SIZED = {
    *("center", "indent", "wordwrap", "slice", "batch", "tojson", "round"),
    *("ljust", "rjust", "zfill", "expandtabs"),
}
"""Filters and methods whose results are as large as one of their numbers says."""
PLAIN = (
    str,
    bytes,
    int,
    float,
    list,
    tuple,
    dict,
    set,
    frozenset,
    Decimal,
    date,
    datetime,
    time,
    timedelta,
    UUID,
)
"""Types of values whose methods may be called. A method of another could do anything, as `to_csv` does."""
AS_TEXT = {
    "capitalize", "center", "e", "escape", "forceescape", "format", "format_map", "indent", "lower", "pprint",
    "replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode",
    "urlize", "wordcount", "wordwrap", "xmlattr",
}  # fmt: skip
"""Filters and methods that make a text of whatever they get, with all that is in it."""
UNBOUNDED = {"translate", "maketrans", "to_bytes"}
"""Methods of plain types whose results may have any size."""
WIDE = re.compile(r"%[^%a-zA-Z]*([0-9]{5}|\*)|\{[^{}]*([0-9]{5}|:[^{}]*\{)")
"""A width or precision of a format that is large, or a value."""


@dataclass
class Budget:
    """What is left to a template for one row: the CPU time of its thread at the end, and characters."""

    until: float
    size: int


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for templates that reach nothing but their values, and change none of these.

    Args:
        most: The largest size of a text, in characters, and of all that a template puts out for a row.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, most: int) -> None:
        # Prompts are plain text, so nothing is escaped. Values have the same text as in a `{field}`.
        super().__init__(undefined=StrictUndefined, finalize=self._put_out, autoescape=False, optimized=False)
        self.most = most
        for kind, names in RANDOM.items():
            for name in names:
                del getattr(self, kind)[name]
        self.filters["join"] = pass_environment(_joined)
        self.filters = {name: self._bounded_filter(name, each) for name, each in self.filters.items()}
        self.filters["step"] = self._step

    @contextmanager
    def one_row(self) -> Iterator[None]:
        """Count what is done inside; `BadRow` is raised there if it is too much."""
        token = _budget.set(Budget(thread_time() + SECONDS, self.most))
        try:
            yield
        finally:
            _budget.reset(token)

    def parse(self, *args: Any, **kwargs: Any) -> nodes.Template:
        """Parse a template, and count the turns of its loops, with the literal text of each."""
        tree = super().parse(*args, **kwargs)
        for loop in tree.find_all(nodes.For):
            literal = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
            step = _filter(nodes.Const(literal), "step")
            loop.body.insert(0, nodes.ExprStmt(step).set_lineno(loop.lineno))
            if loop.test is not None:
                loop.test = nodes.And(_filter(nodes.Const(0), "step"), loop.test).set_lineno(loop.lineno)
        for text in [*tree.find_all(nodes.Concat)]:  # `~` has no function of its own that could be bounded
            text.nodes = [_filter(nodes.List(text.nodes), "join")]
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNBOUNDED and super().is_safe_attribute(obj, attr, value)

    def is_safe_callable(self, obj: Any) -> bool:
        owner = getattr(obj, "__self__", None)
        of_plain = any(isinstance(owner, kind) and hasattr(kind, obj.__name__) for kind in PLAIN)
        of_jinja = any(str(getattr(each, "__module__", "")).startswith("jinja2.") for each in (obj, owner))
        known = of_plain or of_jinja or any(obj is each for each in self.globals.values())
        return known and super().is_safe_callable(obj)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        found = super().wrap_str_format(value)
        if found is None:
            return None

        @functools.wraps(found)
        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, (*args, *kwargs.values()))
            return found(*args, **kwargs)

        checked.__module__ = SandboxedEnvironment.__module__  # Jinja gives it that of `str.format`: None
        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        name = getattr(__obj, "__name__", "")
        owner = getattr(__obj, "__self__", None)
        __self._before(name, (owner, *args), kwargs)
        if name == "join" and isinstance(owner, str):
            return _joined(__self, args[0], owner)
        return __self._bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._step(0)
        if operator == "*":
            for many, number in ((left, right), (right, left)):
                if isinstance(number, int) and _size(many) * number > self.most:
                    raise _too_large("a repeated text or list", self.most)
        if operator == "%":
            self._check_format(left, right.values() if isinstance(right, dict) else _listed(right))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise _too_large("a number", MOST_BITS)
        return self._bounded(super().call_binop(context, operator, left, right))

    def _bounded_filter(self, name: str, given: Callable[..., Any]) -> Callable[..., Any]:
        passed = 1 if getattr(given, "jinja_pass_arg", None) else 0

        @functools.wraps(given)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._before(name, args[passed:], kwargs)
            return self._bounded(given(*args, **kwargs))

        return bounded

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a call, of which the first argument is the value, whose result would be too large."""
        self._step(0)
        numbers = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, int | float)]
        if name in SIZED and any(abs(number) > LARGEST_NUMBER for number in numbers):
            raise _too_large(f"a number of {name!r}", LARGEST_NUMBER)
        if name in AS_TEXT:
            for value in (*args, *kwargs.values()):
                self._check_text(value)
        if name == "format":
            self._check_format(args[0], (*args[1:], *kwargs.values()))
        if name == "sum" and sum(map(_size, _listed(args[0]))) > self.most:
            raise _too_large("a sum of lists", self.most)
        if name == "replace" and len(args) > 2 and all(isinstance(text, str) for text in args[:3]):
            text, old, new = args[:3]
            if len(text) + text.count(old) * len(new) > self.most:
                raise _too_large("a text with replaced parts", self.most)

    def _check_text(self, value: Any) -> None:
        """Refuse a list or a dict whose text would be too large: it may have one text a thousand times."""
        if not isinstance(value, str) and _weight(value, self.most) > self.most:
            raise _too_large("the text of a list", self.most)

    def _check_format(self, text: object, values: Iterable[Any]) -> None:
        """Refuse a format with a large width, or whose fields could repeat a large value."""
        if not isinstance(text, str):
            return
        if WIDE.search(text):
            raise _too_large("a width or a precision of a format", LARGEST_NUMBER)
        fields = text.count("{") + text.count("%")
        if fields * max((_weight(value, self.most) for value in values), default=0) > self.most:
            raise _too_large("a formatted text", self.most)

    def _bounded(self, value: Any) -> Any:
        if _size(value) > self.most:
            raise _too_large("a text or list", self.most)
        return value

    def _put_out(self, value: object) -> str:
        """The text of a value that the template puts out."""
        if isinstance(value, Undefined):
            return str(value)  # raises Jinja's error with the name
        text = plain_text(value)
        self._step(len(text))
        return text

    def _step(self, size: int) -> bool:
        """Count a step that puts out a text of this size. Returns True."""
        if (left := _budget.get()) is not None:
            left.size -= size
            if left.size < 0:
                raise _too_large("the prompt", self.most)
            if thread_time() > left.until:
                raise BadRow(
                    f"the prompt file took more than {SECONDS:.0f} s of CPU for this row: use fewer loops in "
                    "loops, or prompt_func"
                )
        return True


def _filter(value: nodes.Expr, name: str) -> nodes.Filter:
    made = nodes.Filter(value, name, [], [], None, None)
    made.set_lineno(1)  # any line: no error of this filter shows it
    return made


def _joined(environment: Environment, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's `join`, which stops at a result that is too large."""
    assert isinstance(environment, Sandbox)
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    parts, size = [], 0
    for value in values:
        environment._check_text(value)
        parts.append(str(value))
        size += len(parts[-1]) + len(d)
        if size - len(d) > environment.most:
            raise _too_large("a joined text", environment.most)
    return d.join(parts)


def _size(value: object) -> int:
    """The characters of a text, or the bytes of the references in a list, without what they refer to."""
    if isinstance(value, str | bytes):
        return len(value)
    return 8 * len(value) if isinstance(value, list | tuple | dict | set) else 0


def _weight(value: object, most: int) -> int:
    """The size of a value with all that is in it, as often as it is there; counting ends beyond `most`."""
    left, weight = [value], 0
    while left and weight <= most:
        one = left.pop()
        weight += 1 + _size(one)
        if isinstance(one, dict):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            left += one
    return weight


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _too_large(what: str, most: int) -> BadRow:
    return BadRow(f"the prompt file makes {what} larger than {most:,}, which is allowed")
