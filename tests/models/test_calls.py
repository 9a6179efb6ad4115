"""Calls of models against a server: sampling, protocols, records, and wrong calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps, loads
from pathlib import Path
from typing import Any

import pytest

from tests.servers.scripted_server import NO_TEMPLATE
from vllm_tasks import Artifact, InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Completion


class Echo(BaseHTTPRequestHandler):
    """The far side: answers every protocol with the prompt, and `finish_reason` length for `long`."""

    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "served", "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        body = loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"error": {"message": NO_TEMPLATE}}, 400)
            return
        self.server.bodies.append({"path": self.path, **body})  # type: ignore[attr-defined]
        n = body.get("n") or 1
        if self.path == "/generate":
            self.reply({"text": [body["prompt"] + f"!{i}" for i in range(n)]})
        elif "messages" in body:
            text = " | ".join(str(m["content"]) for m in body["messages"])
            self.reply({"choices": [self.choice({"message": {"content": text}}, i, text) for i in range(n)]})
        else:
            text = body["prompt"]
            self.reply({"choices": [self.choice({"text": text}, i, text) for i in range(n)]})

    def choice(self, content: dict[str, Any], index: int, text: str) -> dict[str, Any]:
        return {**content, "index": index, "finish_reason": "length" if "long" in text else "stop"}

    def reply(self, answer: dict[str, Any], status: int = 200) -> None:
        content = dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class EchoServer(ThreadingHTTPServer):
    daemon_threads = True
    bodies: list[dict[str, Any]]


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def api(server: EchoServer, path: str = "", **fields: Any) -> VllmAPI:
    return VllmAPI(identifier="m", api_url=f"http://127.0.0.1:{server.server_port}{path}", **fields)


def test_sampling_of_the_call_wins_over_the_models(server: EchoServer) -> None:
    """`predict_kwargs` are the defaults, each can be overridden by name."""
    with api(server, predict_kwargs={"temperature": 0, "max_tokens": 5}) as model:
        model.predict("x", temperature=0.5)
    assert server.bodies == [
        {"path": "/v1/completions", "model": "served", "prompt": "x", "temperature": 0.5, "max_tokens": 5}
    ]


def test_n_answers_are_a_list(server: EchoServer) -> None:
    """`n > 1`, in the model or the call, gives lists of texts; `n=1` gives texts."""
    with api(server, "/generate", predict_kwargs={"n": 2}) as model:
        assert model.predict("x") == ["!0", "!1"]
        assert model.predict_batches(["x", "y"], n=1) == ["!0", "!0"]
        (completion,) = model.completions(["x"])
        assert isinstance(completion, Completion)
        assert [c.text for c in completion.choices] == ["!0", "!1"]


def test_the_prompt_picks_the_protocol_on_a_base_url(server: EchoServer) -> None:
    """Texts go to completions, messages to chat, both in one call."""
    with api(server) as model:
        rows = ["text", [{"role": "user", "content": "message"}]]
        assert model.predict_batches(rows) == ["text", "message"]
    assert sorted(b["path"] for b in server.bodies) == ["/v1/chat/completions", "/v1/completions"]


def test_a_chat_url_means_chat(server: EchoServer) -> None:
    """The path of the chat protocol makes messages of texts, `system` first."""
    with api(server, "/v1/chat/completions", system="S", prompt="<{input}>") as model:
        assert model.predict("x") == "S | <x>"


def test_a_record_that_fails_is_an_error_among_answers(server: EchoServer) -> None:
    """All rows are processed; the errors come at the end with every result, or as values."""
    with api(server) as model:
        with pytest.raises(RowErrors, match="2 of 4 rows failed: row 1: prompt: 'input' is None") as failed:
            model.predict_batches(["a", None, "b", b"x"])
        values = model.predict_batches(["a", None, "b"], on_error="return")
        with pytest.raises(RowErrors):
            model.predict(None)
        with pytest.raises(RowErrors):
            model.completions([None])
    assert [e.index for e in failed.value.errors] == [1, 3]
    assert failed.value.results[::2] == ["a", "b"]
    assert values[::2] == ["a", "b"]
    assert isinstance(values[1], RowError)
    assert "a" not in repr(failed.value).removeprefix("RowErrors")


def test_no_rows_give_no_answers(server: EchoServer) -> None:
    """An empty list returns an empty list, without a request."""
    with api(server) as model:
        assert model.predict_batches([]) == []
    assert server.bodies == []


@pytest.mark.parametrize("rows", ["text", b"bytes", {"a": "row"}])
def test_one_record_is_not_taken_for_many(server: EchoServer, rows: Any) -> None:
    """A text is no list of letters, a dict no list of its keys."""
    with pytest.raises(InvalidCall, match=r"list of records.*predict\(x\)"):
        api(server).predict_batches(rows)


def test_a_table_is_not_taken_for_the_list_of_its_columns(server: EchoServer) -> None:
    """Iterating a table gives columns, so it is refused with the ways to its rows, which work."""
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": ["x", "y"]})
    with pytest.raises(InvalidCall, match=r"columns.*table\['column'\].*to_pylist\(\) of pyarrow"):
        api(server).predict_batches(table)
    with api(server, signature="**kwargs", prompt="{a}") as model:
        assert model.predict_batches(table.to_pylist()) == ["x", "y"]
    with api(server) as model:
        assert model.predict_batches(table["a"]) == ["x", "y"]
        assert model.predict_batches(pa.array(["x", "y"])) == ["x", "y"]


class PandasSeries:
    """The interface of a pandas column: rows in order, without `to_pylist` or `columns`."""

    def __init__(self, values: list[str]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def test_a_column_of_pandas_is_a_list_of_records(server: EchoServer) -> None:
    """The rows of the column are processed in order."""
    with api(server) as model:
        assert model.predict_batches(PandasSeries(["x", "y"])) == ["x", "y"]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_has_no_order_to_answer_in(server: EchoServer, kind: Any) -> None:
    """Answers in input order need an ordered input."""
    with pytest.raises(InvalidCall, match=f"{kind.__name__}, which has no order"):
        api(server).predict_batches(kind(["x"]))


def test_what_is_wrong_with_a_call_raises_before_anything_is_asked(server: EchoServer) -> None:
    """Names, options and combinations are checked before the call."""
    model = api(server)
    with pytest.raises(InvalidCall, match="did you mean 'temperature'"):
        model.predict("x", temprature=0)
    with pytest.raises(InvalidCall, match="on_error='ignore' is neither"):
        model.predict_batches(["x"], on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(InvalidCall, match="on_error"):
        model.predict("x", on_error="return")
    with pytest.raises(InvalidCall, match="set chat=True"):
        api(server, system="S").predict("x")
    with pytest.raises(InvalidCall, match=r"'top_logprobs' is for chat messages.*chat=True"):
        api(server, chat=False).predict("x", top_logprobs=2)
    with pytest.raises(InvalidCall, match="'suffix' is for text prompts"):
        api(server, chat=True).predict("x", suffix="y")
    with pytest.raises(InvalidCall, match="takes texts, not chat messages"):
        api(server, "/generate").predict([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidCall, match="no context was given"):
        api(server, prompt="{context}{input}").predict("x")
    with pytest.raises(InvalidCall, match="'/absent/file' cannot be read"):
        api(server, prompt="{artifacts.a}{input}", artifacts={"a": Artifact(uri="/absent/file")}).predict("x")
    assert server.bodies == []


def test_chat_only_names_need_messages_locally() -> None:
    """The engine's chat arguments are refused for text prompts, before an engine starts."""
    fields = {"predict_kwargs": {"chat_template": "x"}, "chat": False}
    model = VllmModel(identifier="m", model_name="/absent", **fields)
    with pytest.raises(InvalidCall, match=r"'chat_template' is for chat messages.*chat=True"):
        model.predict("x")


def test_artifacts_reach_the_template(server: EchoServer, tmp_path: Path) -> None:
    """A file named in `artifacts` stands in each prompt."""
    rules = tmp_path / "rules.txt"
    rules.write_text("{input} be kind")
    fields = {"prompt": "{artifacts.rules}: {input}", "artifacts": {"rules": {"uri": str(rules)}}}
    with api(server, **fields) as model:
        assert model.predict("x") == "{input} be kind: x"


def test_cut_answers_are_told_unless_the_caller_set_the_length(
    server: EchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer truncated at a default length is logged as a warning, at a chosen length it is not."""
    with api(server) as model, caplog.at_level(logging.WARNING, "vllm_tasks.models"):
        model.predict_batches(["long"], max_tokens=4)
        model.predict_batches(["short"])
        assert caplog.messages == []
        model.predict_batches(["long", "short"])
    assert "1 of 2 answers were truncated" in caplog.text
