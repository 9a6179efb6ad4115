"""`VllmAPI` against real servers: vLLM's own, and the legacy format served by a real engine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import TINY_ARGS
from tests.engines.poison import ROWS, check_poisoned
from tests.servers.ports import free_port
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.engines import session
from vllm_tasks.engines.local.python import interpreter
from vllm_tasks.errors import RowErrors
from vllm_tasks.results import Completion
from vllm_tasks.serving.api import command_line
from vllm_tasks.serving.shared_server import SERVER
from vllm_tasks.settings import site_settings

pytestmark = pytest.mark.engine

KEY = "a-test-key"
START_SECONDS = 180
ARGUMENTS = command_line({**TINY_ARGS, "served_model_name": "tiny"})


class VllmServer:
    """vLLM's OpenAI server as a process group of its own. Its `arguments` are those of a command line."""

    def __init__(self, model: Path, log: Path, arguments: Sequence[str] = ARGUMENTS) -> None:
        self.model, self.log, self.port, self.arguments = model, log, free_port(), arguments
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        python = interpreter(site_settings().engine_python)
        arguments = ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [python, "-P", str(SERVER), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps([*arguments, "--api-key", KEY, *self.arguments]).encode())

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.2)
        raise AssertionError(f"no server within {START_SECONDS} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process is not None:
            session.kill(self.process.pid)  # all but the resource tracker, which removes shared memory
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tiny_model, tmp_path_factory.mktemp("server") / "log")
    server.start()
    server.wait()
    yield server
    server.kill()


@contextmanager
def client(server: VllmServer, path: str = "", **fields: object) -> Iterator[VllmAPI]:
    fields = {"api_key": KEY, "predict_kwargs": {"temperature": 0, "max_tokens": 8}, **fields}
    model = VllmAPI(identifier="server", api_url=server.url + path, **fields)
    with model:
        yield model


@pytest.mark.parametrize("path", ["", "/v1", "/v1/completions"])
def test_server_and_local_engine_agree(server: VllmServer, local_model: VllmModel, path: str) -> None:
    """The same prompt gives the same greedy answer over HTTP and in process."""
    chat = False if path == "/v1/completions" else None  # the path decides
    alike = local_model.model_copy(update={"chat": chat})
    with client(server, path) as model:
        assert model.predict("The quick brown") == alike.predict("The quick brown")


def test_chat_agrees_with_the_local_engine(server: VllmServer, local_model: VllmModel) -> None:
    """Chat over HTTP and in process builds the same prompt from the same template."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    with client(server, "/v1/chat/completions", system="Be brief.") as model:
        (over_http,) = model.completions(["hello"])
    (in_process,) = local_model.completions([messages])
    assert isinstance(over_http, Completion)
    assert isinstance(in_process, Completion)
    assert over_http.prompt_tokens == in_process.prompt_tokens
    assert over_http.text == in_process.text


def test_full_results_over_http(server: VllmServer) -> None:
    """Logprobs, prompt logprobs, token ids, usage and the model's name come back from a real server."""
    with client(server) as model:
        (text,) = model.completions(["hello"], logprobs=2, prompt_logprobs=1, return_token_ids=True)
        (chat,) = model.completions([[{"role": "user", "content": "hi"}]], logprobs=True, top_logprobs=2)
    for completion in (text, chat):
        assert isinstance(completion, Completion)
        assert completion.model == "tiny"
        assert completion.choices[0].logprobs is not None
        assert len(completion.choices[0].logprobs) == completion.completion_tokens == 8
    assert isinstance(text, Completion)
    assert text.choices[0].token_ids is not None
    assert text.prompt_logprobs is not None
    assert len(text.prompt_logprobs) == text.prompt_tokens


def test_sampling_parameters_pass_through(server: VllmServer) -> None:
    """Structured outputs, n, logit_bias and beam search have vLLM's effects over HTTP."""
    with client(server) as model:
        assert model.predict("x", structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
        assert len(set(model.predict("x", n=3, temperature=1))) == 3
        assert model.predict("x", logit_bias={"40": 100}, max_tokens=3) == "FFF"
        beams = model.predict("x", use_beam_search=True, n=2, max_tokens=4)
        assert len(beams) == 2


def test_poisoned_rows_fail_alone(server: VllmServer) -> None:
    """Of 1,000 rows with 10 poisoned ones, 990 complete in order and 10 errors name their row and reason."""
    with client(server) as model:
        results = model.predict_batches(ROWS, on_error="return", max_tokens=2)
    check_poisoned(results)


@contextmanager
def gateway(upstream: str, silence: float) -> Iterator[str]:
    """A gateway that closes connections that are idle for this many seconds."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = urlsplit(upstream)
        back, forth = await asyncio.open_connection(there.hostname, there.port)
        moved = time.monotonic()

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal moved
            with suppress(ConnectionError):
                while part := await source.read(2**16):
                    moved = time.monotonic()
                    sink.write(part)

        ways = [asyncio.create_task(way) for way in (carry(back, writer), carry(reader, forth))]
        try:
            while not any(way.done() for way in ways) and time.monotonic() - moved < silence:
                await asyncio.wait(ways, timeout=silence / 10, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.close()
            forth.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def end() -> None:
        server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_long_answer_comes_through_a_gateway_that_closes_silent_connections(server: VllmServer) -> None:
    """A stream is never idle; without one, the connection is closed before the answer is there."""
    long = {"max_tokens": 900, "ignore_eos": True, "temperature": 0}
    with client(server, chat=False) as direct:
        (expected,) = direct.completions(["The quick brown"], **long)
    assert isinstance(expected, Completion)
    assert expected.seconds is not None
    with gateway(server.url, silence=expected.seconds / 3) as url:
        fields = {"api_url": url, "api_key": KEY, "retries": 0, "chat": False}
        with VllmAPI(identifier="whole", **fields) as whole, pytest.raises(RowErrors, match="connection"):
            whole.predict("The quick brown", **long)
        with VllmAPI(identifier="streamed", **fields, stream=True) as streamed:
            (answer,) = streamed.completions(["The quick brown"], **long)
    # Of so many tokens the later ones may differ by how vLLM computes them, not by how they come.
    assert isinstance(answer, Completion)
    assert answer.completion_tokens == expected.completion_tokens == 900
    assert answer.text[:8] == expected.text[:8]


def test_wrong_key_and_wrong_model_fail_the_call(server: VllmServer) -> None:
    """401 and 404 end the call at once, with the server's message and the way out."""
    for wrong, said in (({"api_key": "wrong"}, ["401", "api_key"]), ({"model": "other"}, ["404", "other"])):
        with client(server, **wrong) as model, pytest.raises(InvalidCall) as caught:
            model.predict_batches(["a", "b"])
        assert all(words in str(caught.value) for words in said)


def test_greedy_with_several_choices_is_refused_by_the_row(server: VllmServer) -> None:
    """A combination that vLLM refuses with 400 is each row's error, in the server's words."""
    with client(server) as model:
        (error,) = model.predict_batches(["a"], n=2, temperature=0, on_error="return")
    assert isinstance(error, RowError)
    assert error.kind == "refused"
    assert "greedy" in error.message


def test_server_killed_in_the_middle_loses_no_row(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 of the server and its restart, the same call ends with every row complete."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", str(START_SECONDS))

    def kill_and_restart() -> None:
        server.kill()
        server.start()

    accident = threading.Timer(1.0, kill_and_restart)
    rows = [f"row {i}" for i in range(600)]
    with client(server) as model:
        accident.start()
        answers = model.predict_batches(rows, max_tokens=64, ignore_eos=True)
    accident.join()
    server.wait()
    assert len(answers) == 600
    assert all(isinstance(a, str) for a in answers)


# ---------------------------------------------------------------------- the legacy format


@pytest.fixture
def legacy(local_model: VllmModel) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """URL and received bodies of a server that speaks the former api_server's format from a real engine."""
    bodies: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(dict(body))
            prompt = body.pop("prompt")
            texts = local_model.predict(prompt, **body)
            texts = [texts] if isinstance(texts, str) else texts
            answer = json.dumps({"text": [prompt + text for text in texts]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/generate", bodies
        http.shutdown()
        thread.join()


def test_legacy_format(legacy: tuple[str, list[dict[str, object]]], local_model: VllmModel) -> None:
    """`/generate` gets the prompt beside the sampling parameters, and the answer loses the prompt."""
    url, bodies = legacy
    with VllmAPI(identifier="a", api_url=url) as model:
        assert model.predict("1+1=", temperature=0, max_tokens=8) == local_model.predict("1+1=")
        three = model.predict("1+1=", n=3, temperature=1)
    assert bodies[0] == {"prompt": "1+1=", "temperature": 0, "max_tokens": 8}
    assert isinstance(three, list)
    assert len(three) == 3
    assert not any(text.startswith("1+1=") for text in three)
