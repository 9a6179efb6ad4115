"""The process that holds one vLLM engine, started and controlled by `vllm_tasks.engines.local.engine`.

It is run by path and loads by path what it needs of `vllm_tasks`: `session`, `vllm_server` and `adapters`. So
it starts without Prefect, in any environment that has vLLM.

It communicates over one socket in frames, a 4-byte length and JSON. It receives the engine arguments, then
`{"chunk": [[row, prompt], ...], "sampling": {...}, "task": task}` and `{"cancel": [row, ...]}`; the prompt of
a task other than `generate` is the fields of vLLM's request that hold it. It sends
`{"ready": {...}}` or `{"failed": reason}`, then `{"row": row, "answer": {...}, "seconds": s}` with the
response of vLLM's server, `{"row": row, "error": {...}}` or, for a row whose call is wrong,
`{"row": row, "invalid": reason}`; `{"progress": tokens}` while tokens are generated, and `{"dead": reason}`
when the engine has died. It ends when the socket is closed or the parent ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import runpy
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

SHUTDOWN_GRACE = 10.0
"""Seconds that an orderly shutdown may take before the whole session is killed."""
ENGINE_GRACE = 8.0
"""Part of these seconds for vLLM's own processes, which leave a file in the temporary folder if killed."""
REPORT_EVERY = 0.5
"""Seconds between two checks whether the rows have made progress."""
MISSING = "must provide a chat template"
"""Part of vLLM's error for a model without a chat template."""
NOT_SENT = {"prompt_token_ids": True, "choices": {"__all__": {"prompt_token_ids"}}}
"""Long fields that `return_token_ids` adds and that are not part of a `Completion`."""

PR_SET_PDEATHSIG = 1
"""The request with which a process gets a signal from Linux when its parent dies:
https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html"""

if TYPE_CHECKING:
    from vllm_tasks.engines import session
    from vllm_tasks.engines.local import adapters, vllm_server
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "session.py")))
    adapters = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("adapters.py"))))
    vllm_server = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("vllm_server.py"))))


def die_with_parent() -> None:
    """Request SIGKILL for this process when its parent dies.

    Otherwise vLLM's processes would outlive a host that is killed together with its own parent. Ray does that
    to the actors of a driver that ends, and the kernel when it is out of memory.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getsid(os.getppid()) != os.getsid(0):  # it died before the request
            os._exit(1)


if __name__ in ("__main__", "__mp_main__"):  # the host, and what vLLM spawns from it
    session.permit_amx()
if __name__ == "__mp_main__":
    die_with_parent()


class Host:
    """One engine, the handlers of vLLM's own server over it, and the rows in progress."""

    def __init__(self, engine: Any, serving: Any, write: Any) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self.engine = engine
        self.generates = hasattr(serving, "openai_serving_chat")
        if self.generates:
            self.chat, self.text = vllm_server.request_types()
            self.complete_chat = serving.openai_serving_chat.create_chat_completion
            self.render_chat = serving.openai_serving_chat.render_chat_request
            self.complete_text = vllm_server.with_complete_logprobs(serving).create_completion
        self.pooling = vllm_server.pooling_handlers(serving)
        vllm_server.tokenise_short_at_once(engine.renderer)
        self.write = write
        self.adapters = adapters.Adapters(engine, serving.openai_serving_models)
        self.death, self.refusal = EngineDeadError, vllm_server.of_vllm("ErrorResponse")
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def start_chunk(self, frame: session.Frame) -> None:
        """Send every row of a chunk to the engine."""
        accepted = time.perf_counter()
        answer = self.complete if frame["task"] == "generate" else partial(self.pool, frame["task"])
        for row, prompt in frame["chunk"]:
            made = partial(answer, row, prompt, dict(frame["sampling"]))
            task = asyncio.create_task(self.process(row, made, accepted))
            self.tasks[row] = task
            task.add_done_callback(partial(self.forget, row))

    def forget(self, row: int, task: asyncio.Task[None]) -> None:
        self.tasks.pop(row, None)
        if not task.cancelled() and (error := task.exception()):  # else the row would never end
            self.write({"dead": session.reason_of(error)})

    def cancel(self, frame: session.Frame) -> None:
        """Abort rows that no call waits for any more."""
        for row in frame["cancel"]:
            if task := self.tasks.get(row):
                task.cancel()

    async def process(self, row: int, answer: Callable[[], Awaitable[str]], accepted: float) -> None:
        """Process a row and send its answer or its error."""
        try:
            body = await answer()
            self.write(f'{{"row": {row}, "seconds": {time.perf_counter() - accepted}, "answer": {body}}}')
        except (adapters.Unusable, vllm_server.Unsupported) as error:
            self.write({"row": row, "invalid": str(error)[:2000]})
        except self.death as error:
            self.write({"dead": vllm_server.killed(self.engine) or session.reason_of(error)})
        except Exception as error:  # noqa: BLE001 - any exception of vLLM for a row is that row's error
            self.write({"row": row, "error": vllm_server.error_of(error)})

    async def report_progress(self) -> None:
        """Report new tokens of unfinished rows, which send nothing themselves until they are finished."""
        before = 0
        while True:
            await asyncio.sleep(REPORT_EVERY)
            states = self.engine.output_processor.request_states.values()
            # A pooling request has no detokenizer, because it makes no tokens.
            tokens = sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer)
            if tokens != before:
                before = tokens
                self.write({"progress": tokens})

    async def complete(self, row: int, prompt: str | list[Any], sampling: dict[str, Any]) -> str:
        """The response of vLLM's server, as JSON. Raises `Refused` with its message if it refuses the row."""
        if not self.generates:
            raise vllm_server.Unsupported("generate", self.pooling)
        body = {"request_id": str(row), "return_token_ids": not sampling.get("echo"), **sampling}
        if lora := await self.adapters.request(body.pop("lora_request", None)):
            body["model"] = lora.lora_name
        if isinstance(prompt, str) or isinstance(prompt[0], int):  # a text or token ids
            answer = await self.complete_text(self.text(prompt=prompt, **body))
        else:
            answer = await self.complete_chat(self.chat(messages=prompt, **body))
        if isinstance(answer, self.refusal):
            raise vllm_server.Refused(answer.error.message, answer.error.code)
        if lora:
            answer.model = lora.lora_name.rpartition("#")[0]
        return str(answer.model_dump_json(exclude_none=True, exclude=NOT_SENT))

    async def pool(self, task: str, row: int, prompt: dict[str, Any], sampling: dict[str, Any]) -> str:
        """The response of vLLM's server for a task other than `generate`, as JSON."""
        if task not in self.pooling:
            raise vllm_server.Unsupported(task, [*["generate"] * self.generates, *self.pooling])
        handler, of_text, of_chat = self.pooling[task]
        made = of_chat if "messages" in prompt else of_text
        answer = await handler(made(request_id=str(row), **prompt, **sampling))
        if isinstance(answer, self.refusal):
            raise vllm_server.Refused(answer.error.message, answer.error.code)
        return str(answer.body, "utf-8")

    async def has_chat_template(self) -> bool:
        """Whether vLLM finds a chat template for the model, in the model's files or among its own."""
        if not self.generates:
            return False
        try:
            response = await self.render_chat(self.chat(messages=[{"role": "user", "content": "Hello"}]))
        except Exception as error:  # noqa: BLE001 - any error raised by a template shows that there is one
            return MISSING not in str(error)
        return not (isinstance(response, self.refusal) and MISSING in response.error.message)


async def serve(channel: socket.socket) -> None:
    """Start the engine and process frames until the socket is closed or the engine dies."""
    reader, writer = await asyncio.open_connection(sock=channel)

    def write(frame: session.Frame | str) -> None:
        writer.write(session.packed(frame))
        if isinstance(frame, dict) and "dead" in frame:
            dead.set()

    dead = asyncio.Event()
    arguments = await session.read_frame(reader)
    try:
        engine, serving = await vllm_server.start_engine(arguments)
        host = Host(engine, serving, write)
    except BaseException as error:
        write({"failed": session.reason_of(error)})
        await writer.drain()
        raise
    write({"ready": {**vllm_server.facts_of(engine), "chat_template": await host.has_chat_template()}})
    # The host must end with whichever of these ends first, even by an error.
    parts = take_frames(reader, host), dead.wait(), host.report_progress()
    ended, _ = await asyncio.wait(map(asyncio.create_task, parts), return_when=asyncio.FIRST_COMPLETED)
    for part in ended:
        if lost := part.exception():
            write({"dead": session.reason_of(lost)})
    writer.close()
    engine.shutdown(timeout=ENGINE_GRACE)


async def take_frames(reader: asyncio.StreamReader, host: Host) -> None:
    while True:
        try:
            frame = await session.read_frame(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        host.cancel(frame) if "cancel" in frame else host.start_chunk(frame)


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    # When vLLM forks (its default on GPUs), the child's copy of this socket would keep it open after our
    # death and hide that from the parent. The object is closed, not its number: in a child of the child,
    # which runs this too, the number may belong to another file, and that would be closed.
    os.register_at_fork(after_in_child=channel.close)
    os.register_at_fork(after_in_child=die_with_parent)
    # When the parent ends, the socket closes too, and an orderly shutdown gets this time before the kill.
    session.watch(int(sys.argv[2]), grace=SHUTDOWN_GRACE)
    code = 1
    try:
        asyncio.run(serve(channel))
        code = 0
    finally:
        session.end(code)
