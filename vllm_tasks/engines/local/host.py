"""The process that holds one vLLM engine, started and spoken to by `vllm_tasks.engines.local.engine`.

All contact with vLLM's Python API is in this file. It is run by its path and imports nothing of
`vllm_tasks` but `session`, so that it starts without Prefect. Written for and tested with vLLM 0.32.

It talks over one socket in frames, a 4-byte length and JSON. To it: the engine arguments, then
`{"chunk": [[row, prompt], ...], "sampling": {...}}` and `{"cancel": [row, ...]}`. From it:
`{"ready": {...}}` or `{"failed": reason}`, then `{"row": row, "answer": {...}, "seconds": s}` with what
vLLM's server would answer, `{"row": row, "error": {...}}` or, for a row of which the call is wrong,
`{"row": row, "invalid": reason}`; `{"progress": tokens}` while rows get on, and `{"dead": reason}` when the
engine died. The end of the socket, or of the parent, ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import difflib
import json
import os
import platform
import runpy
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

SHUTDOWN_GRACE = 10.0
"""Seconds that an orderly shutdown may take before the whole session is killed."""
ENGINE_GRACE = 8.0
"""Seconds of these for vLLM's own processes: one that is killed leaves a file in the temporary folder."""
TOLD_EVERY = 0.5
"""Seconds between two looks at whether the rows have got on."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Files of a LoRA adapter, as vLLM looks for them."""
MISSING = "must provide a chat template"
"""How vLLM says that a model has none."""
SHORT = 2048
"""Characters of a text that is tokenised at once: vLLM's way through a thread costs more than such a text."""
NOT_TOLD = {"prompt_token_ids": True, "choices": {"__all__": {"prompt_token_ids"}}}
"""What comes with `return_token_ids`, is long, and is no part of a `Completion`."""
TRUSTED = {"trust_request_chat_template": True, "trust_request_mm_kwargs": True}
"""Arguments of vLLM's server, which is not asked by strangers here."""

PR_SET_PDEATHSIG = 1
"""Request by which a process asks Linux for a signal at its parent's death:
https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html"""

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "session.py")))


def die_with_parent() -> None:
    """Ask for SIGKILL when the process that made this one dies.

    vLLM's processes would outlive a host that is killed together with its own parent, as Ray does with the
    actors of a driver that ends, and the kernel where memory is out.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getsid(os.getppid()) != os.getsid(0):  # it died before
            os._exit(1)


if __name__ in ("__main__", "__mp_main__"):  # the host, and what vLLM spawns from it
    session.permit_amx()
if __name__ == "__mp_main__":
    die_with_parent()


class Host:
    """One engine, what vLLM's own server answers with over it, and the rows it works on."""

    def __init__(self, engine: Any, serving: Any, write: Any) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.v1.engine.exceptions import EngineDeadError

        self.engine = engine
        self.chat, self.text = request_types()
        self.answer_chat = serving.openai_serving_chat.create_chat_completion
        self.render_chat = serving.openai_serving_chat.render_chat_request
        self.answer_text = with_whole_logprobs(serving).create_completion
        tokenise_short_at_once(engine.renderer)
        self.write = write
        self.adapters = Adapters(engine, serving.openai_serving_models)
        self.death, self.refusal = EngineDeadError, ErrorResponse
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def start_chunk(self, frame: session.Frame) -> None:
        """Hand every row of a chunk to the engine."""
        accepted = time.perf_counter()
        for row, prompt in frame["chunk"]:
            task = asyncio.create_task(self.answer(row, prompt, dict(frame["sampling"]), accepted))
            self.tasks[row] = task
            task.add_done_callback(partial(self.forget, row))

    def forget(self, row: int, task: asyncio.Task[None]) -> None:
        self.tasks.pop(row, None)
        if not task.cancelled() and (error := task.exception()):  # else its row would be waited for for ever
            self.write({"dead": reason_of(error)})

    def cancel(self, frame: session.Frame) -> None:
        """Abort rows that nobody waits for any more."""
        for row in frame["cancel"]:
            if task := self.tasks.get(row):
                task.cancel()

    async def answer(
        self, row: int, prompt: str | list[Any], sampling: dict[str, Any], accepted: float
    ) -> None:
        """Tell what became of a row, whatever that is."""
        try:
            answer = await self.complete(row, prompt, sampling)
            told = answer.model_dump_json(exclude_none=True, exclude=NOT_TOLD)
            self.write(f'{{"row": {row}, "seconds": {time.perf_counter() - accepted}, "answer": {told}}}')
        except Unusable as error:
            self.write({"row": row, "invalid": str(error)[:2000]})
        except self.death as error:
            self.write({"dead": killed(self.engine) or reason_of(error)})
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises for a row is that row's error
            self.write({"row": row, "error": error_of(error)})

    async def tell_progress(self) -> None:
        """Tell when tokens have come, of which nothing is heard until their row is finished."""
        before = 0
        while True:
            await asyncio.sleep(TOLD_EVERY)
            states = self.engine.output_processor.request_states.values()
            tokens = sum(state.detokenizer.num_output_tokens() for state in states)
            if tokens != before:
                before = tokens
                self.write({"progress": tokens})

    async def complete(self, row: int, prompt: str | list[Any], sampling: dict[str, Any]) -> Any:
        """What vLLM's server answers; raises `Refused` with its words for what it refuses."""
        body = {"request_id": str(row), "return_token_ids": not sampling.get("echo"), **sampling}
        if lora := await self.adapters.request(body.pop("lora_request", None)):
            body["model"] = lora.lora_name
        if isinstance(prompt, str):
            answer = await self.answer_text(self.text(prompt=prompt, **body))
        else:
            answer = await self.answer_chat(self.chat(messages=prompt, **body))
        if isinstance(answer, self.refusal):
            raise Refused(answer.error.message, answer.error.code)
        if lora:
            answer.model = lora.lora_name.rpartition("#")[0]
        return answer

    async def has_chat_template(self) -> bool:
        """Whether vLLM finds a chat template for the model, in its files or of its own."""
        try:
            said = await self.render_chat(self.chat(messages=[{"role": "user", "content": "Hello"}]))
        except Exception as error:  # noqa: BLE001 - whatever a template raises: there is one
            return MISSING not in str(error)
        return not (isinstance(said, self.refusal) and MISSING in said.error.message)


def request_types() -> tuple[Any, Any]:
    """vLLM's chat and completion requests, which also carry what only its engine takes."""
    import msgspec
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    class Engine:
        def to_sampling_params(self, *args: Any) -> Any:
            params, extra = super().to_sampling_params(*args), self.model_extra  # type: ignore[misc,attr-defined]
            return msgspec.structs.replace(params, **extra) if extra else params

    class Chat(Engine, ChatCompletionRequest):  # type: ignore[misc]
        pass

    class Text(Engine, CompletionRequest):  # type: ignore[misc]
        pass

    return Chat, Text


def with_whole_logprobs(serving: Any) -> Any:
    """vLLM's way to complete texts, with the likeliest tokens also as a list.

    The protocol has them by their text, and several may read alike. For chat it has a list.
    """
    text, of_chat = serving.openai_serving_completion, serving.openai_serving_chat._create_chat_logprobs
    of_text = text._create_completion_logprobs

    def create(*, num_output_top_logprobs: int, **given: Any) -> Any:
        logprobs = of_text(num_output_top_logprobs=num_output_top_logprobs, **given)
        most = num_output_top_logprobs if num_output_top_logprobs < 0 else num_output_top_logprobs + 1
        logprobs.content = of_chat(num_output_top_logprobs=most, **given).content
        return logprobs

    text._create_completion_logprobs = create
    return text


def tokenise_short_at_once(renderer: Any) -> None:
    """Spare short texts vLLM's way through a thread."""
    in_thread = renderer.tokenize_prompts_async

    async def tokenize(prompts: list[Any], params: Any) -> Any:
        if all(len(prompt.get("prompt") or ()) <= SHORT for prompt in prompts):
            return renderer.tokenize_prompts(prompts, params)
        return await in_thread(prompts, params)

    renderer.tokenize_prompts_async = tokenize


class Refused(Exception):
    """What vLLM's server says to a request that it does not answer."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def error_of(error: Exception) -> session.Frame:
    """A row's error as a `RowError`, in the words of vLLM's server."""
    from pydantic import ValidationError
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import GenerationError

    if isinstance(error, GenerationError):
        return {"kind": "engine", "message": f"vLLM gave the row up ({error})", "retryable": True}
    if isinstance(error, Refused):
        words, code = str(error), error.code
    else:
        said = create_error_response(error).error
        words, code = said.message, said.code
    if isinstance(error, ValidationError):
        words = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
    if code >= 500:
        return {"kind": "engine", "message": reason_of(error)[:2000]}
    return {"kind": "refused", "message": words[:2000]}


class Unusable(Exception):
    """An adapter that a call names cannot be used."""


class Adapters:
    """LoRA adapters by name and contents: each has a number, a name and a copy of its own.

    To vLLM a number is one adapter for ever, a name one in its prefix cache, and a folder is read anew
    whenever others have taken an adapter's place: changed by then it would mix answers, gone it would end
    the engine. So what a folder has now is copied, and loaded before a row needs it, where a failure is the
    call's alone.
    """

    def __init__(self, engine: Any, models: Any) -> None:
        self.engine = engine
        self.models = models  # of vLLM's server, which gives numbers too: to `default_mm_loras`
        self.loads: dict[str, asyncio.Task[Any]] = {}

    async def request(self, given: Any) -> Any:
        """vLLM's request for the adapter that is `given`, as its folder is now; raises `Unusable`."""
        if given is None:
            return None
        if not isinstance(given, Mapping) or not {"lora_name", "lora_path"} <= given.keys():
            raise Unusable(f"lora_request={given!r:.200} must have lora_name and lora_path")
        wanted = {name: v for name, v in given.items() if name not in ("lora_int_id", "load_inplace")}
        found = stamps(wanted["lora_path"])
        key = json.dumps([wanted, found], sort_keys=True)
        if key not in self.loads:
            self.loads[key] = asyncio.create_task(self.load(key, wanted, found))
        return await asyncio.shield(self.loads[key])

    async def load(self, key: str, wanted: dict[str, Any], found: Stamps) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.lora.utils import get_adapter_absolute_path
        from vllm.v1.engine.exceptions import EngineDeadError

        number = self.models.lora_id_counter.inc(1)
        try:
            if self.engine.vllm_config.lora_config is None:
                raise Unusable("the engine takes none without vllm_kwargs={'enable_lora': True}")
            folder = await asyncio.to_thread(get_adapter_absolute_path, wanted["lora_path"])
            copy = await asyncio.to_thread(copied, Path(folder), number, wanted["lora_path"], found)
            own = {
                "lora_name": f"{wanted['lora_name']}#{number}",
                "lora_int_id": number,
                "lora_path": str(copy),
            }
            request = LoRARequest(**{**wanted, **own})
            await self.engine.add_lora(request)
            self.models.lora_requests[request.lora_name] = request
        except EngineDeadError:
            raise
        except Exception as error:
            del self.loads[key]  # its cause may be gone at the next call
            words = str(error) if isinstance(error, Unusable) else reason_of(error)
            raise Unusable(f"the adapter {wanted['lora_name']!r} cannot be used: {words}") from error
        return request


Stamps = list[tuple[int, int, int]]


def stamps(folder: str) -> Stamps:
    """What tells the contents of an adapter's folder from those before; nothing where it is not here."""
    files = [Path(folder).expanduser() / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)]
    found = [file.stat() for file in files if file.is_file()]
    return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]


def copied(folder: Path, number: int, given: str, found: Stamps) -> Path:
    """A copy of the adapter in `folder`, `given` by the call, that goes with the engine.

    Raises `Unusable` where its files are no more those that were `found`: some may be older than others.
    """
    weights = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / ADAPTER_CONFIG).is_file():
        what = "has no" if folder.is_dir() else "is no folder with"
        raise Unusable(f"{folder} {what} {ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}")
    copy = Path(os.environ[session.SOCKETS]) / f"adapter-{number}"
    copy.mkdir()
    for name in (ADAPTER_CONFIG, *weights):
        shutil.copyfile(folder / name, copy / name)
    if stamps(given) != found:
        raise Unusable(f"{folder} was written to while it was copied; ask again when it is complete")
    return copy


def reason_of(error: BaseException) -> str:
    """The outermost error that has words; vLLM wraps some causes in errors without any."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def killed(engine: Any) -> str:
    """Which process of the engine was ended by a signal, which leaves no word in the log; empty for none."""
    manager = engine.engine_core.resources.engine_manager
    ends = {} if manager is None else manager.finished_procs()
    found = [f"{name} was ended by {session.signal_words(-code)}" for name, code in ends.items() if code < 0]
    return "; ".join(words for words in found if signal.SIGTERM.name not in words)


async def start_engine(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """An AsyncLLM with these arguments, and the state of vLLM's server over it.

    They are of its engine, and of its server where they decide an answer; an unknown one is refused with the
    nearest name.
    """
    from starlette.datastructures import State
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.cli_args import (
        BaseFrontendArgs,
        FrontendArgs,
        validate_parsed_serve_args,
    )
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    of_engine, of_server = (
        {f.name for f in dataclasses.fields(c)} for c in (AsyncEngineArgs, BaseFrontendArgs)
    )
    for name in sorted(arguments.keys() - of_engine - of_server):
        near = difflib.get_close_matches(name, of_engine | of_server, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"vllm_kwargs has {name!r}, which vLLM's engine arguments do not know{hint}")
    # As vLLM's `LLM` does for work in bulk: no statistics a step, and its larger default batches.
    quiet = {"enable_log_requests": False, "disable_log_stats": True}
    given = {**quiet, **TRUSTED, **arguments}
    engine_args = AsyncEngineArgs(**{name: given[name] for name in given.keys() & of_engine})
    server_args = FrontendArgs(**{name: given[name] for name in given.keys() & of_server})
    both = argparse.Namespace(**{**vars(server_args), **vars(engine_args)})
    if isinstance(both.served_model_name, str):
        both.served_model_name = [both.served_model_name]  # as the server's command line has it
    validate_parsed_serve_args(both)
    for plugin, manager in (
        (both.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (both.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if plugin:
            manager(plugin)
    engine = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
    state = State()
    await init_app_state(engine, state, both, ("generate",))
    return engine, state


def facts_of(engine: Any) -> session.Frame:
    import vllm

    config = engine.vllm_config
    return {
        "vllm": vllm.__version__,
        "ranks": len(engine.engine_core.core_engines),  # of data parallel, each with rows of its own
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }


async def serve(channel: socket.socket) -> None:
    """Start the engine and answer frames until the other end is closed or the engine dies."""
    reader, writer = await asyncio.open_connection(sock=channel)

    def write(frame: session.Frame | str) -> None:
        writer.write(session.packed(frame))
        if isinstance(frame, dict) and "dead" in frame:
            dead.set()

    dead = asyncio.Event()
    arguments = await session.read_frame(reader)
    try:
        engine, serving = await start_engine(arguments)
        host = Host(engine, serving, write)
    except BaseException as error:
        write({"failed": reason_of(error)})
        await writer.drain()
        raise
    write({"ready": {**facts_of(engine), "chat_template": await host.has_chat_template()}})
    # Whichever of them ends, and be it by an error: the host must not go on without it.
    parts = take_frames(reader, host), dead.wait(), host.tell_progress()
    ended, _ = await asyncio.wait(map(asyncio.create_task, parts), return_when=asyncio.FIRST_COMPLETED)
    for part in ended:
        if lost := part.exception():
            write({"dead": reason_of(lost)})
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
    # Where vLLM forks (its default on GPUs), a copy of our end would hide our death from the parent. The
    # object knows whether it is open still: in a child of that child its number may be another file's.
    os.register_at_fork(after_in_child=channel.close)
    os.register_at_fork(after_in_child=die_with_parent)
    # The parent's end is an end of the socket too; an orderly shutdown gets its time.
    session.watch(int(sys.argv[2]), grace=SHUTDOWN_GRACE)
    code = 1
    try:
        asyncio.run(serve(channel))
        code = 0
    finally:
        session.end(code)
