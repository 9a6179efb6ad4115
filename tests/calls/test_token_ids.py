"""Prompts that are token ids."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.calls.prompting import prompter, refusal
from tests.servers.scripted_server import Asked, Reply, ScriptedServer
from vllm_tasks import Datalayer, InvalidCall, VllmAPI, VllmModel
from vllm_tasks.results import Completion


def of_ids(asked: Asked) -> Reply | None:
    """Answers with the prompt, whatever it is."""
    if asked.path != "/v1/completions":
        return None
    return Reply({"model": "m", "choices": [{"index": 0, "text": json.dumps(asked.body["prompt"])}]})


def api(server: ScriptedServer, path: str = "", **fields: Any) -> VllmAPI:
    server.script = of_ids
    return VllmAPI(identifier="m", model="m", api_url=server.url + path, retries=0, **fields)


@pytest.mark.parametrize("chat", [None, True, False])
def test_token_ids_are_sent_as_they_are(server: ScriptedServer, chat: bool | None) -> None:
    """To completions, whatever texts become; a record or a function gives them."""
    with api(server, chat=chat) as model:
        assert model.predict_batches([[1, 2], (3,)]) == ["[1, 2]", "[3]"]
    with api(server, chat=chat, prompt_func=lambda x: [len(x), 7]) as model:
        assert model.predict("abc") == "[3, 7]"


def test_a_column_of_lists_is_prompts(server: ScriptedServer, tmp_path: Any) -> None:
    """A table has them in a column of JSON lines, or of Parquet."""
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "ids": [5, 6]}\n{"id": 2, "ids": []}\n')
    with api(server, db=Datalayer(url=str(tmp_path)), keep=["prompt"]) as model:
        model.predict_in_db("ids", "rows", max_failed=None)
    good, bad = sorted(model.db.outputs("m").to_pylist(), key=lambda row: row["id"])  # type: ignore[union-attr]
    assert (good["output"], good["_prompt"]) == ("[5, 6]", "[5, 6]")
    assert bad["_error"].startswith("prompt: ")


@pytest.mark.parametrize("made", [[], [1, "a"], [True], [1.0]])
def test_other_lists_are_none(made: list[Any]) -> None:
    """Token ids are whole numbers, at least one."""
    assert "token ids, got a list" in refusal(prompter(prompt_func=lambda x: made)("x"))


def test_what_takes_no_token_ids_is_refused(server: ScriptedServer) -> None:
    """Chat, /generate, a system message, a repair."""
    for path in ("/v1/chat/completions", "/generate"):
        with api(server, path) as model, pytest.raises(InvalidCall, match="takes no token ids"):
            model.predict([1])
    assert "take no system" in refusal(prompter(system="S")([1]))
    with api(server, repair=1) as model, pytest.raises(InvalidCall, match=re.escape("use resample")):
        model.predict([1])
    assert not server.posts


@pytest.mark.engine
def test_the_engine_reads_token_ids_as_the_text_that_they_are(local_model: VllmModel) -> None:
    """Real vLLM gives the same answer to a text and to its tokens."""
    Tokenizer = pytest.importorskip("tokenizers").Tokenizer  # noqa: N806 - a class
    fields = {name: getattr(local_model, name) for name in ("model_name", "vllm_kwargs", "predict_kwargs")}
    model = VllmModel(identifier="ids", chat=False, **fields)
    words = "The capital of France is"
    ids = Tokenizer.from_file(f"{model.model_name}/tokenizer.json").encode(words).ids
    of_text, of_ids = model.completions([words, ids])
    assert isinstance(of_text, Completion)
    assert of_text == of_ids
    assert of_text.prompt_tokens == len(ids) > 1
