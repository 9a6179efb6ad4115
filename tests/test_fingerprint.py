"""What is in a fingerprint: the same for the same work on any machine, another for other work."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from vllm_tasks.fingerprint import (
    canonical,
    engine_identity,
    fingerprint,
    input_hash,
    sampling_identity,
    source_of,
)
from vllm_tasks.outputs import Decoder


def say(word: str) -> Callable[[str], str]:
    return lambda x: word + x


class Saying:
    """A callable object with a state."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, x: str) -> str:
        return self.word + x


def typed_in(text: str) -> Any:
    """A function without a source file, as in an interactive session."""
    names: dict[str, Any] = {}
    exec(text, names)
    return names["f"]


def of(function: Any) -> str:
    return fingerprint({"prompt_func": source_of(function)})


def say_by_default(word: str) -> Callable[[str], str]:
    return lambda x, word=word: word + x


def say_one_of(first: str | None, second: str | None) -> Callable[[str], str]:
    return lambda x: (first or second or "") + x


def find(word: str) -> Callable[[str], Any]:
    pattern = re.compile(word)
    return lambda x: pattern.sub("", x)


def say_first(word: str) -> Callable[[str], str]:
    words = deque([word])
    return lambda x: words[0] + x


@pytest.mark.parametrize(
    "make",
    [
        say, Saying, lambda word: functools.partial(Saying("x"), word), say_by_default, find, say_first,
        lambda word: say_one_of("x", None) if word == "a" else say_one_of(None, "x"),
    ],
)  # fmt: skip
def test_a_function_counts_with_its_state(make: Callable[[str], Any]) -> None:
    """What a function closes over, an object holds or a partial has bound decides its prompts."""
    assert of(make("a")) == of(make("a"))
    assert of(make("a")) != of(make("b"))


def test_a_function_without_source_counts_by_its_code() -> None:
    """A function that was typed in is another one when it is typed in otherwise."""
    assert of(typed_in("def f(x): return x + 'a'")) == of(typed_in("def f(x): return x + 'a'"))
    assert of(typed_in("def f(x): return x + 'a'")) != of(typed_in("def f(x): return x + 'b'"))
    assert of(typed_in("def f(x): return x.upper()")) != of(typed_in("def f(x): return x.lower()"))
    inner = "def f(x): return [(lambda y: y + {!r})(z) for z in x]"
    assert of(typed_in(inner.format("a"))) != of(typed_in(inner.format("b")))


def test_no_address_is_in_it() -> None:
    """An object is known by what it is, or every process would ask all rows again."""
    assert canonical({"a": object()}) == canonical({"a": object()})
    assert "0x" not in canonical([object(), Saying("a"), functools.partial(say, object())])


def test_numbers_that_a_form_cannot_tell_apart_are_the_same() -> None:
    """A browser makes 0 of 0.0; True is not 1."""
    assert fingerprint({"temperature": 0.0}) == fingerprint({"temperature": 0})
    assert fingerprint({"temperature": 0.5}) != fingerprint({"temperature": 0})
    assert fingerprint({"x": True}) != fingerprint({"x": 1})


def test_the_order_of_a_schema_counts_and_that_of_parameters_does_not() -> None:
    """Properties are answered in their order; parameters have none."""

    def schema(*names: str) -> str:
        decoder = Decoder.of(None, dict.fromkeys(names, "str"), False, False)
        return fingerprint({"outputs": decoder.identity()})

    assert schema("a", "b") != schema("b", "a")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "value",
    [
        b"\x00\xff",
        date(2026, 1, 2),
        {date(2026, 1, 2): 1},
        [None, {"a": (1, 2)}],
        {1, 2},
        float("nan"),
        2**70,
    ],
)
def test_any_value_of_a_table_can_be_hashed(value: Any) -> None:
    """Values of all types have a hash, equal for equal ones and another than their text's."""
    assert input_hash([value]) == input_hash([value])
    assert input_hash([value]) != input_hash([str(value)])


def test_deep_values_have_an_end() -> None:
    """A value nested in itself is no endless loop."""
    deep: list[Any] = []
    deep.append(deep)
    assert input_hash([deep])


def test_a_local_model_counts_by_its_files(tmp_path: Path) -> None:
    """Where the folder is does not matter, a changed file does; what only changes the speed does not."""

    def folder(name: str, weights: bytes) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        return str(tmp_path / name)

    large = b"a" * (17 * 2**20)
    one, two, other = folder("one", large), folder("two", large), folder("other", b"b" + large[1:])
    assert engine_identity({"model": one}) == engine_identity({"model": two, "tensor_parallel_size": 2})
    assert engine_identity({"model": one}) != engine_identity({"model": other})
    assert engine_identity({"model": one}) != engine_identity({"model": one, "dtype": "float32"})


def test_a_token_for_downloads_does_not_count_and_an_adapter_counts_by_its_files(tmp_path: Path) -> None:
    """Neither who loads the model nor where the adapter's folder is decides an answer."""
    assert engine_identity({"model": "m", "hf_token": "a"}) == engine_identity({"model": "m"})
    asked = []
    for folder, content in ("here", "a"), ("there", "a"), ("again", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter.bin").write_text(content)
        lora = {"lora_name": "l", "lora_int_id": 1, "lora_path": str(tmp_path / folder)}
        asked.append(sampling_identity({"temperature": 0, "lora_request": lora}))
    assert asked[0] == asked[1] != asked[2]
    assert sampling_identity({"temperature": 0}) == {"temperature": 0}


def test_it_is_the_same_in_another_process() -> None:
    """Neither the order of sets nor any address is in it."""
    code = "from tests.test_fingerprint import *; print(of(Saying('a')), input_hash([{'x', 'y', 'z'}]))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
