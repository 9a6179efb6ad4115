"""Functions have equal fingerprints for the same work on any machine, others for different work."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calls.zoo import KINDS, build, told, typed
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.calls.functions import made_of
from vllm_tasks.calls.source_code import _sources, source_of

ROOT = Path(__file__).parents[2]


def of(function: Any) -> Any:
    return made_of(function, "prompt_func")


def refusal(function: Any) -> str:
    with pytest.raises(InvalidCall) as refused:
        of(function)
    return str(refused.value)


def a_datum(draw: random.Random, depth: int = 0) -> Any:
    plain: list[Any] = [0, 1, 1.0, True, None, "", "1", "a", "b", b"a", -0.0, 2**70, "a'{b}"]
    if depth == 2 or draw.random() < 0.6:
        return draw.choice(plain)
    items = [a_datum(draw, depth + 1) for _ in range(draw.randint(0, 2))]
    return draw.choice([items, tuple(items), dict(zip(draw.sample(plain[3:8], 2), items, strict=False))])


def a_recipe(draw: random.Random, depth: int = 0) -> list[Any]:
    inner = None if depth == 3 or draw.random() < 0.4 else a_recipe(draw, depth + 1)
    return [draw.choice([*KINDS]), a_datum(draw), inner]


def zoo(seed: int, size: int) -> list[Any]:
    draw = random.Random(seed)
    return [
        *([kind, datum, None] for kind in KINDS for datum in "ab"),
        *(a_recipe(draw) for _ in range(size)),
    ]


def test_functions_that_answer_otherwise_never_share_a_fingerprint() -> None:
    """Two functions of any kind, also nested, that return different texts have different fingerprints."""
    recipes = zoo(seed=15, size=200)
    said = zip(recipes, [build(recipe)("some text") for recipe in recipes], told(recipes), strict=True)
    differ = 0
    for (recipe, words, one), (other_recipe, other_words, other) in itertools.combinations(said, 2):
        differ += words != other_words
        assert words == other_words or one != other, (recipe, other_recipe)
    assert differ > 15_000


def test_a_function_has_one_fingerprint_in_all_processes() -> None:
    """Addresses, the order of sets and earlier calls are not part of it."""
    recipes = zoo(seed=16, size=60)
    here = [build(recipe) for recipe in recipes]
    before = [of(function) for function in here]
    assert before == told(recipes)
    for function in here:
        function("some text")
    assert [of(function) for function in here] == before
    command, given = [sys.executable, "-m", "tests.calls.zoo"], {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run(
        command, input=repr(recipes), env=given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == before


def test_a_function_counts_as_it_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was changed after the import does not change the fingerprint of the running function."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "prompts_of_a_test.py"
    file.write_text("WORD = 'a'\ndef f(x):\n    return 'a' + WORD + x\n")
    module = importlib.import_module(file.stem)
    first, shown = module.f, of(module.f)
    file.write_text("WORD = 'a'\n\ndef f(x):\n    return 'b' + WORD + x\n")
    importlib.invalidate_caches()
    assert of(first) not in (shown, of(importlib.reload(module).f))
    changed = of(module.f)
    file.write_text("WORD = 'a'\n# A comment.\n\n\ndef f(x):\n    return 'b' + WORD + x\n")
    assert of(importlib.reload(module).f) == changed
    module.WORD = "b"
    assert of(module.f) != changed


def test_modules_of_the_user_count_by_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import inside a function counts, too; installed modules count by their names."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_a_test").mkdir()
    (tmp_path / "package_of_a_test" / "__init__.py").touch()
    words = tmp_path / "package_of_a_test" / "words.py"
    words.write_text("WORD = 'a'\nOTHER = object()\ndef longer(x): return x + WORD\n")
    within = typed(
        "def f(x):\n    import json\n    from package_of_a_test import words\n    return words.longer(x)"
    )
    before = of(within)
    assert within("b") == "ba"
    assert of(within) == before
    module = importlib.import_module("package_of_a_test.words")
    module.OTHER = object  # type: ignore[attr-defined]
    assert of(within) == before
    module.WORD = "c"  # type: ignore[attr-defined]
    assert of(within) != before
    held = [module]
    hidden = [
        lambda x: held[0].longer(x),
        lambda x: getattr(module, "WORD") + x.strip(),  # noqa: B009
        lambda x: longest_of(module) + x.strip(),
    ]
    for function in hidden:
        assert "module 'package_of_a_test.words'" in refusal(function)


def longest_of(module: Any) -> str:
    return max(vars(module).values(), key=lambda value: len(str(value)))


def test_a_package_counts_where_a_module_of_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`import a.b` gives the name `a`."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outer_of_a_test").mkdir()
    (tmp_path / "outer_of_a_test" / "__init__.py").write_text("WORD = 'a'\n")
    (tmp_path / "outer_of_a_test" / "inner.py").touch()
    function = typed("def f(x):\n    import outer_of_a_test.inner\n    return outer_of_a_test.WORD + x")
    before = of(function)
    monkeypatch.setattr("outer_of_a_test.WORD", "b")
    assert of(function) != before


LAID_OUT = """
import functools, logging
from pathlib import Path

TEXT = Path(__file__).parent / "text.txt"

@functools.cache
def f(x):
    logging.getLogger(__name__).debug("%s", __file__)
    return TEXT.read_text() + x + 'a' u"b"
"""


LAID_OUT_ANEW = """
# A comment.
import ast
import functools
import logging
from pathlib import Path

TEXT = Path(__file__).parent / "text.txt"


@functools.cache
# Another.
def f(x):
    # One more.
    logging.getLogger(__name__).debug("%s", __file__)

    return (
        TEXT.read_text() + x + "ab"
    )
"""


def module_of(folder: Path, text: str, name: str) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("text")
    (folder / f"{name}.py").write_text(text)
    loader = SourceFileLoader(name, str(folder / f"{name}.py"))
    module = types.ModuleType(name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


def test_neither_layout_nor_place_counts(tmp_path: Path) -> None:
    """A formatter, a comment, another folder or another module name does not rerun any row."""
    here = of(module_of(tmp_path / "here", LAID_OUT, "here").f)
    there = module_of(tmp_path / "there", LAID_OUT_ANEW, "there")
    assert of(there.f) == here
    (tmp_path / "there" / "text.txt").write_text("other")
    assert of(there.f) != here


def test_the_spaces_of_a_text_count(tmp_path: Path) -> None:
    """Spaces at the beginning of a line and on an empty line count as part of a text in the source."""
    made = 'def make():\n{0}def f(x):\n{0}    return """{1}\n{0}text""" + x\n{0}return f\n'
    texts = [made.format(indent, end) for indent in ("  ", "    ") for end in ("", "\n  ", "\n   ")]
    functions = [module_of(tmp_path, text, f"spaces{i}").make() for i, text in enumerate(texts)]
    assert len({of(function) for function in functions}) == len({f("") for f in functions}) == 6


def test_long_code_is_read(tmp_path: Path) -> None:
    """A function may have more names than one byte can number, and a sum with many parts."""
    lines = "\n".join(f"        x.a{i}" for i in range(300))
    many = typed(f"def f(x):\n    if x == 'a':\n{lines}\n    from json import dumps\n    return dumps(x)")
    assert of(many)
    module = module_of(tmp_path, "def f(x):\n    return " + "x + " * 900 + "'a'\n", "long")
    assert of(module.f)


def test_a_file_counts_by_its_contents(tmp_path: Path) -> None:
    """A function that holds a path counts by the contents of the file."""
    path = tmp_path / "prompt.txt"
    path.write_text("a")
    before = of(lambda x: path.read_text() + x)
    path.write_text("b")
    assert of(lambda x: path.read_text() + x) != before


class Disconnected:
    @property
    def version(self) -> str:
        raise RuntimeError("no connection")

    def __call__(self, x: str) -> str:
        return x


class Opaque:
    def __getattribute__(self, name: str) -> Any:
        raise KeyError(name)


class Guarded:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def make(self, x: str) -> str:
        return x


lines = iter(["a"])


tangle: tuple[Any, ...] = ()
for _ in range(60):
    tangle = tangle, tangle


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (Guarded().make, "its object > lock is a _thread.lock"),
        (functools.partial(Guarded.make, Guarded()), "lock is a _thread.lock"),
        (lambda x: x + next(lines), "lines is a builtins.list_iterator, which changes as it is used"),
        (typed("def f(x): return eval(x)"), "calls eval"),
        (typed("def f(x): return x if held else ''", held=tangle), "holds more than"),
        (typed("def f(x): return x if held else ''", held=nested(10_000)), "nested too deep"),
        (typed("def f(x): return environ[x]", environ=os.environ), "environ is a os._Environ"),
        (functools.lru_cache(typed("def f(x): return r.random()", r=random.Random(1))), "random.Random"),
        (typed("def f(x): return r.random()", r=np.random.default_rng(1)), "Generator, which changes"),
        (typed("import importlib\ndef f(x): return importlib.import_module(x).WORD"), "calls import_module"),
        (typed("def f(x): return (home / 'a').read_text()", home=ROOT), "home is the folder"),
        (
            typed("def f(x):\n    import tests.calls.raises_when_imported"),
            "f cannot be read (RuntimeError: no key)",
        ),
        (typed("def f(x): return x if held else ''", held=Opaque()), "f cannot be read (KeyError"),
        (Disconnected(), "cannot be read (RuntimeError: no connection)"),
    ],
)
def test_what_cannot_be_determined_is_refused(function: Any, why: str) -> None:
    """The error says where the object is, and the way out."""
    message = refusal(function)
    assert why in message
    assert message.startswith("prompt_func ")
    assert "f.version = '1'" in message


class Versioned(Guarded):
    version = "1"

    def __call__(self, x: str) -> str:
        return x


def test_a_declared_version_speaks_for_a_function() -> None:
    """A version works on a function, a function that it calls, a method, an object's class and a partial."""

    def declared(version: str) -> Callable[[str], str]:
        def f(x: str) -> str:
            return x + next(lines)

        f.version = version  # type: ignore[attr-defined]
        return f

    def calling(version: str) -> Callable[[str], str]:
        inner = declared(version)
        return lambda x: inner(x)

    for make in declared, calling:
        assert of(make("1")) == of(make("1")) != of(make("2"))
    part = functools.partial(Guarded().make)
    part.version = 1  # type: ignore[attr-defined]
    assert of(Versioned()) != of(part)
    assert of(Versioned()) == of(Versioned())


def versioned(x: str) -> str:
    return x + next(lines)


versioned.version = "1"  # type: ignore[attr-defined]


def test_a_version_is_loaded_with_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved block has the function's path, and the module that is there gives its version."""
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["tests"]')
    saved = VllmAPI(
        identifier="m", api_url="http://127.0.0.1:1", model="m", chat=False, prompt_func=versioned
    ).model_dump()
    saved |= {"db": None, "api_key": None}
    loaded = VllmAPI(**saved)
    prints = [
        model.prepare(model.predict_in_db).over("x").fingerprint for model in (loaded, VllmAPI(**saved))
    ]
    assert prints[0] == prints[1]
    monkeypatch.setattr(versioned, "version", "2")
    assert loaded.prepare(loaded.predict_in_db).over("x").fingerprint != prints[0]


def test_what_is_there_under_its_name_is_known_by_it() -> None:
    """Types, functions of C and functions of libraries."""
    named = [str, bytes, str.upper, len, json.loads, json.dumps, functools.partial(str.replace)]
    assert len({of(function) for function in named}) == len(named)


def test_a_function_that_changes_what_it_holds_is_refused_before_a_row_is_asked(tmp_path: Path) -> None:
    """Otherwise the next call would rerun all rows; a function with a version is not checked."""
    seen: list[str] = []

    def f(x: str) -> str:
        seen.append(x)
        return x

    (tmp_path / "t.csv").write_text("id,text\n1,a\n")
    with ScriptedServer() as server:
        model = VllmAPI(identifier="m", api_url=server.url, model="stub", prompt_func=f)
        with pytest.raises(InvalidCall, match="changes its own data"):
            model.predict_in_db("text", "t", db=tmp_path)
        assert not server.posts
        f.version = "1"  # type: ignore[attr-defined]
        assert model.predict_in_db("text", "t", db=tmp_path).succeeded == 1
        assert model.predict_in_db("text", "t", db=tmp_path).up_to_date == 1


def test_a_call_without_a_table_needs_no_fingerprint() -> None:
    """`predict` accepts any function."""
    log, lock = logging.getLogger("a"), threading.Lock()

    def f(x: str) -> str:
        with lock:
            log.debug(x)
            return x

    with ScriptedServer() as server:
        model = VllmAPI(identifier="m", api_url=server.url, model="stub", prompt_func=f)
        assert len(model.predict_batches(["a", "b"])) == 2
        with pytest.raises(InvalidCall, match="lock is a _thread"):
            model.prepare(model.predict_in_db).over("text")


def test_a_source_is_read_though_another_thread_parses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 raises `SystemError` at times when two threads parse at once."""

    def classify(context: str) -> str:
        return context

    expected, parse, refusals = source_of(classify), ast.parse, iter(range(3))

    def parse_beside_another(text: str) -> ast.Module:
        if next(refusals, None) is not None:
            raise SystemError("AST constructor recursion depth mismatch (before=69, after=79)")
        return parse(text)

    _sources.cache_clear()
    monkeypatch.setattr(ast, "parse", parse_beside_another)
    assert source_of(classify) == expected
