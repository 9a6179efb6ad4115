"""OpenAI batch files: read as a table, written from one, and the results of outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from deltalake import DeltaTable, Field
from deltalake.schema import PrimitiveType

from tests.places import Place
from tests.servers.scripted_server import Reply, ScriptedServer, refused
from vllm_tasks import InvalidCall, VllmAPI, batch_request, export_batch, export_batch_results

CHAT = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5}
TEXT = {"model": "gpt", "prompt": "yo", "stream": False, "stop": None}


def lines(path: Path) -> dict[str, Any]:
    """The lines of a file by their `custom_id`."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["custom_id"]: line for line in read}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A lake with a batch file."""
    bodies = [CHAT, TEXT, {"model": "gpt", "input": "yo"}, {"prompt": "x", "max_token": 2}]
    with (tmp_path / "batch.jsonl").open("w") as file:
        for i, body in enumerate(bodies):
            url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            line = {"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}
            file.write(json.dumps(line) + "\n")
    return tmp_path


@pytest.fixture
def model(server: ScriptedServer, folder: Path) -> VllmAPI:
    return VllmAPI(
        identifier="m", api_url=server.url, prompt_func=batch_request, chat=False, db=str(folder), retries=0
    )


def run(model: VllmAPI) -> Any:
    return model.predict_in_db("body", "batch", primary_id="custom_id", max_failed=None)


def test_a_batch_file_is_a_table(model: VllmAPI, server: ScriptedServer, folder: Path) -> None:
    """Each body is sent with its parameters, to the endpoint of its kind, and to the model that is called."""
    report = run(model)
    assert (report.succeeded, report.failed) == (2, 2)
    assert {post.path: post.body for post in server.posts} == {
        "/v1/chat/completions": {**CHAT, "model": "scripted-model"},
        "/v1/completions": {"model": "scripted-model", "prompt": "yo"},
    }
    errors = {row["custom_id"]: row["_error"] for row in model.db.outputs("m").to_pylist()}  # type: ignore[union-attr]
    assert "this one has ['input', 'model']" in errors["r2"]
    assert "did you mean 'max_tokens'?" in errors["r3"]
    assert run(model).processed == 0


def test_bodies_may_be_texts() -> None:
    """As a column of a database has them."""
    assert batch_request(json.dumps(CHAT)) == batch_request(CHAT)
    assert batch_request({"messages": []}).prompt == []
    with pytest.raises(ValueError, match="a body must be an object, got a list"):
        batch_request("[]")


@pytest.mark.parametrize(
    "more",
    [
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        {"chat_template_kwargs": {"chat_template": "{{ x }}"}},
        {"lora_request": {"lora_name": "a", "lora_path": "/etc"}},
        {"mm_processor_kwargs": {"size": {"height": 10**6}}},
        {"media_io_kwargs": {"video": {"num_frames": 10**6}}},
    ],
)
def test_a_body_is_data(more: dict[str, Any]) -> None:
    """Whoever writes rows brings no template, no folder and no sizes for the engine."""
    with pytest.raises(ValueError, match="which is more than data: set it for the call"):
        batch_request({**CHAT, **more})
    assert batch_request({**CHAT, "chat_template_kwargs": {"enable_thinking": False}})


def test_rows_become_a_batch_file_that_gives_the_same_requests(
    model: VllmAPI, server: ScriptedServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file has what a run would send; a row without a prompt is left out and named."""
    count = export_batch(model, "body", "batch", folder / "out.jsonl", primary_id="custom_id", top_p=0.5)
    assert count == 2
    assert server.posts == []
    assert "2 rows are not in the batch file, the first is r2" in caplog.text
    written = lines(folder / "out.jsonl")
    assert written == {
        "r0": {
            "custom_id": "r0",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**CHAT, "model": "scripted-model", "top_p": 0.5},
        },
        "r1": {
            "custom_id": "r1",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "scripted-model", "prompt": "yo", "top_p": 0.5},
        },
    }
    model.predict_in_db("body", "out", primary_id="custom_id", predict_id="again")
    assert [post.body for post in server.posts if post.path == "/v1/completions"] == [written["r1"]["body"]]


def test_a_line_that_cannot_be_read_is_named(
    model: VllmAPI, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no request, and is not silently left out."""
    with (folder / "batch.jsonl").open("a") as file:
        file.write("no json\n")
    assert export_batch(model, "body", "batch", folder / "out.jsonl", primary_id="custom_id") == 2
    assert "1 lines could not be read and are not in the batch file, the first is" in caplog.text
    assert "batch.jsonl, line 5: no JSON" in caplog.text


def test_any_table_becomes_one(server: ScriptedServer, place: Place, tmp_path: Path) -> None:
    """Keys become texts; columns give parameters; the model may have another name elsewhere."""
    place.fill_texts("a", "b")
    model = VllmAPI(identifier="m", api_url=server.url, chat=True, system="Be kind", db=place.db)
    count = export_batch(
        model, "text", "SELECT *, id + 1 AS budget FROM rows", tmp_path / "out.jsonl",
        sampling_columns={"max_tokens": "budget"}, model_name="gpt-5",
    )  # fmt: skip
    written = lines(tmp_path / "out.jsonl")
    assert (count, sorted(written)) == (2, ["0", "1"])
    assert written["1"]["body"] == {
        "model": "gpt-5",
        "messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "b"}],
        "max_tokens": 2,
    }


def test_outputs_become_results(model: VllmAPI, server: ScriptedServer, folder: Path) -> None:
    """Every row has a response or an error, under its `custom_id`."""
    server.script = lambda asked: refused(400, "no") if asked.prompt == "hi" else None
    run(model)
    assert export_batch_results("m", folder / "out.jsonl", db=str(folder)) == 4
    results = lines(folder / "out.jsonl")
    assert sorted(results) == ["r0", "r1", "r2", "r3"]
    body = results["r1"]["response"]["body"]
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " yo!"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert results["r1"]["error"] is None
    assert results["r0"]["response"] is None
    assert results["r0"]["error"]["code"] == "refused"
    export_batch_results("m", folder / "text.jsonl", db=str(folder), url="/v1/completions")
    assert lines(folder / "text.jsonl")["r1"]["response"]["body"]["choices"][0]["text"] == " yo!"


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # of vLLM's imports
def test_vllms_own_classes_read_both_files(model: VllmAPI, folder: Path) -> None:
    """Those of its `run-batch`."""
    protocol = pytest.importorskip("vllm.entrypoints.launchers.run_batch", reason="vLLM 0.32 and newer")
    run(model)
    export_batch(model, "body", "batch", folder / "requests.jsonl", primary_id="custom_id")
    export_batch_results("m", folder / "results.jsonl", db=str(folder))
    requests = (folder / "requests.jsonl").read_text().splitlines()
    chat = protocol.BatchRequestInput.model_validate_json(requests[0])
    assert (chat.custom_id, chat.body.max_tokens, chat.body.temperature) == ("r0", 5, 0.5)
    results = [
        protocol.BatchRequestOutput.model_validate_json(line)
        for line in (folder / "results.jsonl").read_text().splitlines()
    ]
    answered = {result.custom_id: result for result in results if result.error is None}
    assert answered["r0"].response.body.choices[0].message.content == " hi!"
    assert answered["r0"].response.body.usage.completion_tokens == 5
    assert sorted(result.custom_id for result in results if result.error) == ["r2", "r3"]


def test_typed_outputs_are_json(server: ScriptedServer, tmp_path: Path) -> None:
    """Several columns are an object; flattened outputs are refused, since a request has one result."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts('{"name": "Ada"}')
    fields = {"identifier": "m", "api_url": server.url, "db": place.db, "retries": 0}
    typed = VllmAPI(**fields, output_schema={"name": "str", "age": "int"}, chat=False)
    server.script = lambda asked: answered('{"name": "Ada", "age": 36}') if asked.body else None
    typed.predict_in_db("text", "rows")
    export_batch_results("m", tmp_path / "out.jsonl", db=place.db, primary_id="id")
    choice = lines(tmp_path / "out.jsonl")["0"]["response"]["body"]["choices"][0]
    assert json.loads(choice["message"]["content"]) == {"name": "Ada", "age": 36}
    listed = VllmAPI(**fields, datatype="json", flatten=True, chat=False)
    server.script = lambda asked: answered("[1, 2]") if asked.body else None
    listed.predict_in_db("text", "rows", predict_id="listed")
    with pytest.raises(InvalidCall, match="several rows for one request"):
        export_batch_results("listed", tmp_path / "out.jsonl", db=place.db, primary_id="id")
    with pytest.raises(InvalidCall, match=r"\['custom_id'\] is not the key of '_outputs__m'"):
        export_batch_results("m", tmp_path / "out.jsonl", db=place.db)


def test_columns_of_people_are_not_part_of_the_answer(
    server: ScriptedServer, place: Place, tmp_path: Path
) -> None:
    """They are at the end of the table, and a text stays a text."""
    place.fill_texts("a")
    model = VllmAPI(identifier="m", api_url=server.url, chat=False, db=place.db)
    model.predict_in_db("text", "rows")
    if place.kind == "lake":
        table = DeltaTable(f"{place.url}/_outputs__m")
        table.alter.add_columns([Field("mine", PrimitiveType("string"))])
    else:
        engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.execute(sa.text('ALTER TABLE "_outputs__m" ADD COLUMN mine TEXT'))
        engine.dispose()
    export_batch_results("m", tmp_path / "out.jsonl", db=place.db, primary_id="id")
    choice = lines(tmp_path / "out.jsonl")["0"]["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == " a!"


@pytest.mark.parametrize("key", ["output", "_model", "costum_id"])
def test_results_need_the_whole_key(model: VllmAPI, folder: Path, key: Any) -> None:
    """Another column would give results that are of no request."""
    run(model)
    with pytest.raises(InvalidCall, match="is not the key of '_outputs__m'"):
        export_batch_results("m", folder / "out.jsonl", db=str(folder), primary_id=key)


def test_a_part_of_the_key_is_refused(server: ScriptedServer, tmp_path: Path) -> None:
    """Several results would have one `custom_id`."""
    place = Place(str(tmp_path / "lake"))
    place.fill([{"id": 1, "part": part, "text": "a"} for part in (1, 2)])
    model = VllmAPI(identifier="m", api_url=server.url, chat=False, db=place.db)
    model.predict_in_db("text", "rows", primary_id=["id", "part"])
    with pytest.raises(InvalidCall, match="is not the key of '_outputs__m'"):
        export_batch_results("m", tmp_path / "out.jsonl", db=place.db, primary_id="id")
    export_batch_results("m", tmp_path / "out.jsonl", db=place.db, primary_id=["part", "id"])
    assert sorted(lines(tmp_path / "out.jsonl")) == ["[1, 1]", "[2, 1]"]


def test_an_unknown_endpoint_is_refused(model: VllmAPI, folder: Path) -> None:
    """It would get results of text completions."""
    wrong: Any = "/v1/chat/completion"
    with pytest.raises(InvalidCall, match="is none of '/v1/chat/completions', '/v1/completions'"):
        export_batch_results("m", folder / "out.jsonl", db=str(folder), url=wrong)


def test_json_within_a_typed_answer_is_no_text(server: ScriptedServer, place: Place, tmp_path: Path) -> None:
    """Bytes are their text. SQLite does not know which texts are JSON."""
    place.fill_texts("a")
    schema = {"tags": "json", "raw": "bytes", "none": "json"}
    model = VllmAPI(identifier="m", api_url=server.url, chat=False, db=place.db, output_schema=schema)
    answer = '{"tags": ["x", 0.5], "raw": "é", "none": null}'
    server.script = lambda asked: answered(answer) if asked.body else None
    model.predict_in_db("text", "rows")
    export_batch_results("m", tmp_path / "out.jsonl", db=place.db, primary_id="id")
    content = lines(tmp_path / "out.jsonl")["0"]["response"]["body"]["choices"][0]["message"]["content"]
    if place.kind == "sqlite":
        content = content.replace('\\"', '"').replace('"[', "[").replace(']"', "]")
    assert content == answer


def answered(text: str) -> Any:
    choice = {"index": 0, "finish_reason": "stop", "text": text}
    return Reply({"model": "m", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


def test_a_file_is_there_only_when_it_is_complete(
    model: VllmAPI, server: ScriptedServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the middle leaves the file of before; the site's places hold for it too."""
    (folder / "out.jsonl").write_text("before")
    with pytest.raises(InvalidCall, match="no column 'boby'"):
        export_batch(model, "boby", "batch", folder / "out.jsonl", primary_id="custom_id")
    assert (folder / "out.jsonl").read_text() == "before"
    monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps([str(folder)]))
    with pytest.raises(InvalidCall, match="outside the places that this site allows"):
        export_batch(model, "body", "batch", folder.parent / "out.jsonl", primary_id="custom_id")


def test_what_is_no_file_and_no_model_is_refused(model: VllmAPI, folder: Path) -> None:
    """A folder would get a file of some name; a name is no model."""
    wrong: Any = 5
    for path in (folder, f"{folder}/", wrong, "", "out\0"):
        with pytest.raises(InvalidCall, match="is not the path of a file"):
            export_batch(model, "body", "batch", path, primary_id="custom_id")
    assert [file.name for file in folder.iterdir()] == ["batch.jsonl"]
    with pytest.raises(InvalidCall, match="not known: nowhere; give a path or an fsspec URI"):
        export_batch(model, "body", "batch", "nowhere://bucket/out.jsonl", primary_id="custom_id")
    with pytest.raises(InvalidCall, match="not a VllmAPI or VllmModel"):
        export_batch(wrong, "body", "batch", folder / "out.jsonl")
    with pytest.raises(InvalidCall, match="neither a Datalayer nor its URL"):
        export_batch_results("m", folder / "out.jsonl", db=wrong)
