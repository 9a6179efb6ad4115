"""`chat=None`: the model's files, its server or its engine decide how texts are sent."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import TINY_ARGS
from tests.servers.scripted_server import (
    MODEL,
    NO_TEMPLATE,
    Asked,
    Deed,
    Reply,
    ScriptedServer,
    answer_to,
    refused,
)
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel, serve
from vllm_tasks.artifacts import markdown_of
from vllm_tasks.calls import chat
from vllm_tasks.calls.chat import of_files
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.control import lacks_template

TOLD = Reply({"count": 3, "max_model_len": 8, "tokens": [1, 2, 3]})
"""What vLLM's /tokenize says for chat messages."""
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
Make = Callable[..., VllmAPI]


@pytest.fixture
def api(server: ScriptedServer) -> Iterator[Make]:
    """Makes models of the scripted server, whose engine no other test has."""
    made: list[VllmAPI] = []

    def make(url: str | list[str] = server.url, **fields: Any) -> VllmAPI:
        made.append(VllmAPI(identifier="m", api_url=url, **{"model": "m", "retries": 0, **fields}))
        return made[-1].init()

    yield make
    for model in made:
        model.close()


def paths(server: ScriptedServer) -> list[str]:
    return [asked.path for asked in server.posts]


def no_chat(asked: Asked) -> Deed:
    """A gateway in front of a model without a chat template."""
    return refused(400, f"upstream said: {NO_TEMPLATE}") if asked.path == CHAT else None


# ---------------------------------------------------------------------- servers


@pytest.mark.parametrize(("told", "path"), [(TOLD, CHAT), (refused(400, NO_TEMPLATE), TEXT)])
def test_a_server_is_asked_once(server: ScriptedServer, api: Make, told: Reply, path: str) -> None:
    """vLLM's own server reports whether it has a chat template, once for all calls and without a row."""
    server.tokenizes = told
    model = api()
    assert model.predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
    assert model.predict("c") == answer_to("c")
    assert paths(server) == [path] * 3
    assert [r.path for r in server.requests].count("/tokenize") == 1


@pytest.mark.parametrize(
    ("fields", "suffix", "sampling", "path"),
    [
        ({"chat": True}, "", {}, CHAT),
        ({"chat": False}, "", {}, TEXT),
        ({}, "/v1/completions", {}, TEXT),
        ({}, "/v1/chat/completions", {}, CHAT),
        ({}, "/generate", {}, "/generate"),
        ({}, "", {"suffix": "x"}, TEXT),
        ({}, "", {"top_logprobs": 1}, CHAT),
        ({"prompt_func": lambda x: [{"role": "user", "content": x}]}, "", {}, CHAT),
    ],
)
def test_nothing_is_asked_where_the_call_says_it(
    server: ScriptedServer, api: Make, fields: dict[str, Any], suffix: str, sampling: Any, path: str
) -> None:
    """`chat`, a path, a parameter that only one kind takes, or messages decide, whatever the model is."""
    server.tokenizes = TOLD if path != CHAT else refused(400, NO_TEMPLATE)
    assert api(server.url + suffix, **fields).predict("x", **sampling) == answer_to("x")
    assert [r.path for r in server.requests] == [path]


@pytest.mark.parametrize(
    "told",
    [Reply(status=404), Reply(status=405), Reply({"tokens": []}), Reply(b"<html>"), refused(401, "no")],
)
def test_where_nothing_tells_it_is_chat(server: ScriptedServer, api: Make, told: Reply) -> None:
    """A gateway without /tokenize, or with another one, gets the rows as chat, and nothing else."""
    server.tokenizes = told
    model = api()
    assert model.predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
    assert model.predict("c") == answer_to("c")
    assert paths(server) == [CHAT] * 3
    assert sorted(asked.prompt for asked in server.posts) == ["a", "b", "c"]
    assert fingerprint_of(model) == fingerprint_of(api(chat=True))


@pytest.mark.parametrize("owner", ["openai", None])
def test_only_a_server_that_is_vllm_is_asked(server: ScriptedServer, api: Make, owner: str | None) -> None:
    """Another one, which may bill the question as a prompt, gets the rows and nothing else."""
    listing = Reply({"data": [{"id": MODEL, "owned_by": owner}]})
    server.tokenizes = TOLD
    server.script = lambda asked: listing if asked.path == "/v1/models" else None
    assert api().predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
    assert "/tokenize" not in [r.path for r in server.requests]
    assert paths(server) == [CHAT] * 2


def test_a_refusal_for_want_of_a_template_turns_to_text(
    server: ScriptedServer, api: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """All rows complete, later ones are sent as text at once, and one warning names the way to say it.

    The fingerprint stays that of a call that does not know it yet, so that the next process finds the rows.
    """
    server.tokenizes, server.script = Reply(status=404), no_chat
    model = api()
    before = fingerprint_of(model)
    with caplog.at_level(logging.WARNING):
        assert model.predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
        assert model.predict("c") == answer_to("c")
    assert sorted(paths(server)) == sorted([CHAT, CHAT, TEXT, TEXT, TEXT])
    assert paths(server)[-1] == TEXT
    (warning,) = [r.getMessage() for r in caplog.records if "plain text" in r.getMessage()]
    assert "chat=False" in warning
    assert server.url in warning
    assert fingerprint_of(model) == before


@pytest.mark.parametrize("words", ["the chat template of the request is not trusted", "no such temperature"])
def test_another_refusal_does_not(server: ScriptedServer, api: Make, words: str) -> None:
    """Another refusal is an error of its row, and the next row is sent as chat."""
    server.tokenizes = Reply(status=404)
    server.script = lambda asked: refused(400, words) if len(server.posts) < 2 else None
    results = api().predict_batches(["a", "b"], on_error="return")
    assert [type(r).__name__ for r in results].count("RowError") == 1
    assert paths(server) == [CHAT] * 2


def test_messages_of_the_caller_are_never_turned_to_text(server: ScriptedServer, api: Make) -> None:
    """Where chat is refused, a row of messages has the refusal as its error, and texts complete."""
    server.tokenizes, server.script = Reply(status=404), no_chat
    xs: list[Any] = ["a", [{"role": "user", "content": "b"}]]
    first, second = api().predict_batches(xs, on_error="return")
    assert first == answer_to("a")
    assert isinstance(second, RowError)
    assert second.kind == "refused"


def test_of_many_servers_the_first_that_is_there_is_asked(server: ScriptedServer, api: Make) -> None:
    """The reply of one server counts for all."""
    with ScriptedServer() as other, ScriptedServer() as third:
        server.stop()
        other.tokenizes = TOLD
        model = api([server.url, other.url, third.url])
        assert model.predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]
        asked = [r.path for one in (other, third) for r in one.requests]
        assert asked.count("/tokenize") == 1
        assert not {TEXT} & {*paths(other), *paths(third)}
        server.start()


def test_servers_of_different_models_get_no_trial_row(server: ScriptedServer) -> None:
    """They are compared before one is tried."""
    with ScriptedServer() as other:
        server.tokenizes = other.tokenizes = Reply(status=404)
        other.script = lambda r: Reply({"data": [{"id": "other"}]}) if r.path == "/v1/models" else None
        with pytest.raises(InvalidCall, match="'other'"):
            VllmAPI(identifier="m", api_url=[server.url, other.url]).predict("a")
        assert not {TEXT, CHAT} & {*paths(server), *paths(other)}


def test_a_table_says_how_its_texts_were_sent(server: ScriptedServer, api: Make, tmp_path: Path) -> None:
    """A table resumes with the explicit `chat` that was found."""
    (tmp_path / "t.csv").write_text("id,text\n1,a\n2,b\n")
    server.tokenizes = TOLD
    report = api().predict_in_db("text", "t", db=str(tmp_path))
    assert (report.chat, report.succeeded) == (True, 2)
    assert "chat template" in str(report)
    assert "texts sent as chat template" in markdown_of(report)
    again = api(chat=True).predict_in_db("text", "t", db=str(tmp_path))
    assert (again.up_to_date, again.processed) == (2, 0)
    plain = api(chat=False).predict_in_db("text", "t", db=str(tmp_path))
    assert (plain.chat, plain.replaced) == (False, 2)
    assert "texts sent as plain text" in markdown_of(plain)


def test_a_system_message_needs_a_template(server: ScriptedServer, api: Make) -> None:
    """A system message is sent as chat, and is refused with the way out if texts are sent as plain text."""
    with pytest.raises(InvalidCall, match=r"no chat template.*set chat=True"):
        api(system="S").predict("x")
    server.tokenizes, server.script = Reply(status=404), no_chat
    with pytest.raises(InvalidCall, match=r"no chat template: put the words into the prompt"):
        api(system="S", timeout=8).predict("x")
    server.tokenizes, server.script = TOLD, lambda _: None
    server.requests.clear()
    api(system="S", timeout=9).predict("x")
    assert [m["content"] for m in server.posts[0].body["messages"]] == ["S", "x"]


def test_a_system_text_is_not_lost_once_chat_was_refused(server: ScriptedServer, api: Make) -> None:
    """Models that differ in it share an engine, which sends texts since a row of the other was refused."""
    server.tokenizes, server.script = Reply(status=404), no_chat
    assert api().predict("x") == answer_to("x")
    with pytest.raises(InvalidCall, match=r"no chat template: put the words into the prompt"):
        api(system="S").predict("x")


def fingerprint_of(model: VllmAPI | VllmModel) -> str:
    return model.prepare(model.predict_in_db).over("text").fingerprint


# ---------------------------------------------------------------------- files

TEMPLATE = "{{ messages }}"
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": TEMPLATE}]
FILES: dict[str, tuple[dict[str, Any], bool | None]] = {
    "none": ({}, False),
    "in the configuration": ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, True),
    "named": ({"tokenizer_config.json": {"chat_template": NAMED}}, True),
    "named without a default": ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, None),
    "of its own": ({"chat_template.jinja": TEMPLATE}, True),
    "several": ({"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": TEMPLATE}, True),
    "others": ({"additional_chat_templates/rag.jinja": TEMPLATE}, None),
    "of a type": ({"config.json": {"model_type": "siglip"}}, True),
    "in code": ({"config.json": {"architectures": ["DeepseekV32ForCausalLM"]}}, None),
    "own tokenizer": ({"tokenizer_config.json": {"auto_map": {}}}, None),
    "no configuration": ({"tokenizer_config.json": "no JSON"}, None),
}


def bare(folder: Path, tiny_model: Path, files: dict[str, Any]) -> Path:
    """The tiny model without its template, and with these files, written into its own."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
        path.write_text(content)
    return folder


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # torch's, of what vLLM imports
@pytest.mark.parametrize("name", FILES)
def test_files_tell_what_vllm_would_find(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """The files are read without vLLM; if they are not conclusive, the engine is asked."""
    from transformers import AutoTokenizer
    from vllm.renderers.hf import resolve_chat_template

    files, told = FILES[name]
    folder = bare(tmp_path / "m", tiny_model, files)
    assert of_files({"model": str(folder)}) is told
    assert of_files({"model": "/absent", "tokenizer": str(folder)}) in (told, None)
    if told is None:
        return
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    config = SimpleNamespace(
        tokenizer_revision=None, code_revision=None, trust_remote_code=False, tokenizer=str(folder),
        model=str(folder), hf_config=SimpleNamespace(model_type=kind),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = resolve_chat_template(tokenizer, None, None, model_config=config)
    assert (found is not None) is told


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
def test_the_exceptions_are_those_of_vllm() -> None:
    """The types with a template of vLLM's own, and those whose chat is written in code."""
    from vllm.transformers_utils.chat_templates.registry import _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK

    assert _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK.keys() == chat.FALLBACKS
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], "config", "model.py").read_text()
    text = source[source.index("# Set default tokenizer modes based") :]
    text = text[: text.index('if self.tokenizer_mode != "auto"')]
    found = set(re.findall(r'"(\w+For\w+)"', text))
    assert found == chat.WITHOUT_TEMPLATE


def test_a_template_given_to_the_engine_counts() -> None:
    """A template for the engine counts, also under the name of the server's option."""
    assert of_files({"model": "/absent", "chat-template": TEMPLATE})
    assert of_files({"model": "/absent", "tokenizer_mode": "mistral"}) is None


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """The cache of the Hugging Face hub, with two revisions of one model."""
    chat._listing.cache_clear()
    repository = tmp_path / "models--org--tiny"
    for revision, commit, template in (("main", "a" * 40, TEMPLATE), ("base", "b" * 40, None)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="comes with vLLM")
def test_the_cache_of_hugging_face_tells_too(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is read by name and revision, the tokenizer's first, without any network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = {"model": "org/tiny", "download_dir": str(hub)}
    assert of_files(cached) is True
    assert of_files({**cached, "revision": "base"}) is False
    assert of_files({**cached, "revision": "base", "tokenizer_revision": "main"}) is True
    assert of_files({**cached, "model": "org/other"}) is None
    assert of_files({**cached, "model": "org/other", "tokenizer": "org/tiny"}) is True


@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="comes with vLLM")
def test_a_hub_that_is_away_does_not_tell_that_there_is_no_template(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache may have some of a repository's files only, so the engine is asked."""
    import huggingface_hub.constants
    from huggingface_hub import hf_api

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    cached = {"model": "org/tiny", "download_dir": str(hub)}
    assert of_files({**cached, "revision": "base"}) is None
    assert of_files(cached) is True


# ---------------------------------------------------------------------- engines


@pytest.mark.engine
def test_a_local_model_is_asked_as_it_is(local_model: VllmModel) -> None:
    """The template is found without the engine, and the engine confirms it."""
    forced, plain = (local_model.model_copy(update={"chat": chat}) for chat in (True, False))
    assert local_model.completions(["hello"])[0] == forced.completions(["hello"])[0]
    assert local_model.completions(["hello"])[0].prompt_tokens > plain.completions(["hello"])[0].prompt_tokens
    assert fingerprint_of(local_model) == fingerprint_of(forced) != fingerprint_of(plain)
    assert loop.run(sharing.has_chat_template(local_model.engine_config()))


@pytest.mark.engine
def test_an_engine_is_asked_where_files_do_not_tell(tiny_model: Path, tmp_path: Path) -> None:
    """The engine reports that vLLM found no template, so texts are sent as plain text."""
    folder = bare(tmp_path / "m", tiny_model, {"tokenizer_config.json": {"auto_map": {}}})
    fields = {"identifier": "bare", "model_name": str(folder), "vllm_kwargs": TINY_ARGS}
    with VllmModel(**fields, predict_kwargs={"temperature": 0, "max_tokens": 4}) as model:
        plain = model.model_copy(update={"chat": False})
        assert model.completions(["hello"])[0].choices == plain.completions(["hello"])[0].choices
        assert fingerprint_of(model) == fingerprint_of(plain)


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.usefixtures("all_processes_of_vllm")
def test_vllms_own_server_tells_that_it_has_no_template(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """/tokenize shows it before the first row; without /tokenize its refusal of chat is recognised."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = bare(tmp_path / "m", tiny_model, {})
    fields = {"identifier": "bare", "model_name": str(folder), "vllm_kwargs": TINY_ARGS}
    with serve(VllmModel(**fields, predict_kwargs={"temperature": 0, "max_tokens": 4})) as served:
        shared = {"identifier": "m", "api_key": served.api_key, "predict_kwargs": served.predict_kwargs}
        with VllmAPI(**shared, api_url=served.api_url) as model, caplog.at_level(logging.WARNING):
            assert model.predict("hello") == served.predict("hello")
            assert not [r for r in caplog.records if "chat=" in r.getMessage()]
            (row,) = model.completions([[{"role": "user", "content": "hello"}]], on_error="return")
            assert isinstance(row, RowError)
            assert lacks_template(row.message)
