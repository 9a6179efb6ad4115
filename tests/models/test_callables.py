"""Callables of models: by dotted path, from allowed modules, and dumped as their paths."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from json import dumps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.models.making import BOTH, Maker, refusal
from vllm_tasks import DataType, VllmAPI
from vllm_tasks.settings import Settings


def shout(x: str) -> str:
    return x.upper()


class Shouter:
    def __call__(self, x: str) -> str:
        return x.upper()


REEXPORTS = """
import functools
from os import popen, system
import os
from pathlib import Path

def own(x):
    return x

class Own:
    @staticmethod
    def method(x):
        return x

part = functools.partial(system)
word = "text"
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module under an allowed prefix that also holds things from elsewhere."""
    made = ModuleType("flows.x_for_tests")
    exec(REEXPORTS, made.__dict__)  # as a file of this name would be
    monkeypatch.setitem(sys.modules, made.__name__, made)
    import flows

    monkeypatch.setattr(flows, "x_for_tests", made, raising=False)
    return made.__name__


@BOTH
def test_a_dotted_path_becomes_its_callable(make: Maker, module: str) -> None:
    """Functions and static methods of allowed modules are found by their path."""
    found = make(identifier="m", prompt_func=f"{module}.own").prompt_func
    assert found is sys.modules[module].own
    method = make(identifier="m", prompt_func=f"{module}.Own.method").prompt_func
    assert method is sys.modules[module].Own.method


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("os.system", "'os.system' is outside"),
        ("builtins.eval", "'builtins.eval' is outside"),
        ("flowsx.f", "'flowsx.f' is outside"),
        ("{module}.system", "leads into 'posix', which is outside"),
        ("{module}.os.system", "leads into 'posix', which is outside"),
        ("{module}.popen", "leads into 'os', which is outside"),
        ("{module}.Path", "leads into 'pathlib"),
        ("{module}.part", "leads into 'functools', which is outside"),
        ("{module}.own.__class__", "leads into 'builtins', which is outside"),
        ("{module}.own.__globals__.get", "leads into 'None', which is outside"),
        ("{module}.own.__builtins__.get", "leads into 'None', which is outside"),
        ("vllm_tasks.calls.callables.pkgutil.resolve_name", "leads into 'pkgutil', which is outside"),
    ],
)
def test_paths_out_of_the_allowed_modules_are_refused(module: str, path: str, said: str) -> None:
    """Paths are refused directly and through a module that imports something from elsewhere."""
    message = refusal(VllmAPI, prompt_func=path.format(module=module))
    assert said in message
    assert "VLLM_TASKS_CALLABLE_PREFIXES" in message
    assert f"{Settings().callable_prefixes}" in message


def test_saved_callables_come_from_the_flows_unless_a_site_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default no function of this package, nor of any other, can be named in a block."""
    monkeypatch.delenv("VLLM_TASKS_CALLABLE_PREFIXES")
    assert Settings().callable_prefixes == ["flows"]
    assert "outside" in refusal(VllmAPI, prompt_func="vllm_tasks.engines.session.kill")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{module}.absent", "has no attribute 'absent'"),
        ("{module}.word", "is not callable but a str"),
        ("flows.absent.f", "No module named 'flows.absent'"),
        ("flows", "is not callable but a module"),
        ("flows.", "cannot import"),
        ("flows..f", "cannot import"),
        ("flows.a b", "cannot import"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(module: str, path: str, said: str) -> None:
    """The error shows the path and why nothing callable is found there."""
    path = path.format(module=module)
    message = refusal(VllmAPI, prompt_func=path)
    assert said in message
    assert repr(path) in message


def test_a_module_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the module's own missing import, not a missing attribute of its parent."""
    package = tmp_path / "pkg_for_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["pkg_for_tests"]')
    assert "not_installed_anywhere" in refusal(VllmAPI, prompt_func="pkg_for_tests.needs.f")
    sys.modules.pop("pkg_for_tests", None)


def test_the_setting_names_the_allowed_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """An added prefix allows its modules; modules that are not listed any more are refused."""
    assert "is outside" in refusal(VllmAPI, prompt_func=f"{__name__}.shout")
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", dumps([__name__.partition(".")[0]]))
    assert VllmAPI(identifier="m", prompt_func=f"{__name__}.shout").prompt_func is shout
    assert "is outside" in refusal(VllmAPI, prompt_func="vllm_tasks.calls.prompts.joined")


async def awaited(x: str) -> str:
    return x


def yielding(x: str) -> Iterator[str]:
    yield x


class Awaited:
    async def __call__(self, x: str) -> str:
        return x


@pytest.mark.parametrize("function", [awaited, yielding, Awaited(), functools.partial(awaited)])
def test_a_function_that_returns_no_value_is_refused(function: Callable[..., Any]) -> None:
    """Each row's prompt would be a coroutine or a generator, so the model is refused when it is made."""
    assert "is an async function or a generator" in refusal(VllmAPI, prompt_func=function)


def test_callables_are_dumped_as_their_paths() -> None:
    """Functions, lambdas and callable objects all have a dump; only saving checks that they can be loaded."""
    paths = [
        VllmAPI(identifier="m", prompt_func=f).model_dump()["prompt_func"]
        for f in (shout, Shouter(), lambda x: x)
    ]
    assert paths[0] == f"{__name__}.shout"
    assert paths[1] == f"{__name__}.Shouter"
    assert "<lambda>" in paths[2]


async def waits(x: object, row: object = None) -> str:
    return "x"


def yields(x: object, row: object = None) -> Iterator[str]:
    yield "x"


class Waiter:
    async def __call__(self, x: object, row: object = None) -> str:
        return "x"


@pytest.mark.parametrize("function", [waits, yields, Waiter()])
def test_a_function_that_returns_later_is_refused(function: Callable[..., object]) -> None:
    """Its coroutine or generator would be an error of every row."""
    with pytest.raises(ValueError, match="is an async function or a generator"):
        VllmAPI(identifier="m", api_url="http://x", prompt_func=function)
    with pytest.raises(ValueError, match="is an async function or a generator"):
        DataType(identifier="d", decoder=function)
