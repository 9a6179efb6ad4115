"""The process that holds one vLLM engine, started and controlled by `vllm_tasks.engines.local.engine`.

All code that uses vLLM's Python API is in this file. It is run by path and imports nothing of
`vllm_tasks` but `session`, so that it starts without Prefect, in any environment that has vLLM.

It communicates over one socket in frames, a 4-byte length and JSON. It receives the engine arguments, then
`{"chunk": [[row, prompt], ...], "sampling": {...}}` and `{"cancel": [row, ...]}`. It sends
`{"ready": {...}}` or `{"failed": reason}`, then `{"row": row, "answer": {...}, "seconds": s}` with the
response of vLLM's server, `{"row": row, "error": {...}}` or, for a row whose call is wrong,
`{"row": row, "invalid": reason}`; `{"progress": tokens}` while tokens are generated, and `{"dead": reason}`
when the engine has died. It ends when the socket is closed or the parent ends.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import difflib
import importlib
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
"""Part of these seconds for vLLM's own processes, which leave a file in the temporary folder if killed."""
REPORT_EVERY = 0.5
"""Seconds between two checks whether the rows have made progress."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Files of a LoRA adapter, by the names that vLLM looks for."""
MISSING = "must provide a chat template"
"""Part of vLLM's error for a model without a chat template."""
SHORT = 2048
"""Characters of the longest text that is tokenised without a thread, which would cost more than the text."""
NOT_SENT = {"prompt_token_ids": True, "choices": {"__all__": {"prompt_token_ids"}}}
"""Long fields that `return_token_ids` adds and that are not part of a `Completion`."""
TRUSTED = {"trust_request_chat_template": True, "trust_request_mm_kwargs": True}
"""Arguments of vLLM's server, which are safe because only this package sends it requests."""

MOVED = {
    "ErrorResponse": ("serve.engine.protocol", "openai.engine.protocol"),
    "GenerationError": ("openai.completion.serving",),
    "create_error_response": ("serve", "serve.utils.error_response"),
    "init_app_state": ("launchers.api_server.app_state", "openai.api_server"),
    "BaseFrontendArgs": ("common.cli_args", "launchers.cli_args", "openai.cli_args"),
    "FrontendArgs": ("common.cli_args", "launchers.cli_args", "openai.cli_args"),
    "validate_parsed_serve_args": ("common.cli_args", "launchers.cli_args", "openai.cli_args"),
}
"""The modules under `vllm.entrypoints` that hold a name, the newest first, in vLLM 0.26 to 0.33."""

PR_SET_PDEATHSIG = 1
"""The request with which a process gets a signal from Linux when its parent dies:
https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html"""

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "session.py")))


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
        self.chat, self.text = request_types()
        self.complete_chat = serving.openai_serving_chat.create_chat_completion
        self.render_chat = serving.openai_serving_chat.render_chat_request
        self.complete_text = with_complete_logprobs(serving).create_completion
        tokenise_short_at_once(engine.renderer)
        self.write = write
        self.adapters = Adapters(engine, serving.openai_serving_models)
        self.death, self.refusal = EngineDeadError, of_vllm("ErrorResponse")
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def start_chunk(self, frame: session.Frame) -> None:
        """Send every row of a chunk to the engine."""
        accepted = time.perf_counter()
        for row, prompt in frame["chunk"]:
            task = asyncio.create_task(self.process(row, prompt, dict(frame["sampling"]), accepted))
            self.tasks[row] = task
            task.add_done_callback(partial(self.forget, row))

    def forget(self, row: int, task: asyncio.Task[None]) -> None:
        self.tasks.pop(row, None)
        if not task.cancelled() and (error := task.exception()):  # else the row would never end
            self.write({"dead": reason_of(error)})

    def cancel(self, frame: session.Frame) -> None:
        """Abort rows that no call waits for any more."""
        for row in frame["cancel"]:
            if task := self.tasks.get(row):
                task.cancel()

    async def process(
        self, row: int, prompt: str | list[Any], sampling: dict[str, Any], accepted: float
    ) -> None:
        """Process a row and send its answer or its error."""
        try:
            answer = await self.complete(row, prompt, sampling)
            body = answer.model_dump_json(exclude_none=True, exclude=NOT_SENT)
            self.write(f'{{"row": {row}, "seconds": {time.perf_counter() - accepted}, "answer": {body}}}')
        except Unusable as error:
            self.write({"row": row, "invalid": str(error)[:2000]})
        except self.death as error:
            self.write({"dead": killed(self.engine) or reason_of(error)})
        except Exception as error:  # noqa: BLE001 - any exception of vLLM for a row is that row's error
            self.write({"row": row, "error": error_of(error)})

    async def report_progress(self) -> None:
        """Report new tokens of unfinished rows, which send nothing themselves until they are finished."""
        before = 0
        while True:
            await asyncio.sleep(REPORT_EVERY)
            states = self.engine.output_processor.request_states.values()
            tokens = sum(state.detokenizer.num_output_tokens() for state in states)
            if tokens != before:
                before = tokens
                self.write({"progress": tokens})

    async def complete(self, row: int, prompt: str | list[Any], sampling: dict[str, Any]) -> Any:
        """The response of vLLM's server. Raises `Refused` with its message if it refuses the row."""
        body = {"request_id": str(row), "return_token_ids": not sampling.get("echo"), **sampling}
        if lora := await self.adapters.request(body.pop("lora_request", None)):
            body["model"] = lora.lora_name
        if isinstance(prompt, str):
            answer = await self.complete_text(self.text(prompt=prompt, **body))
        else:
            answer = await self.complete_chat(self.chat(messages=prompt, **body))
        if isinstance(answer, self.refusal):
            raise Refused(answer.error.message, answer.error.code)
        if lora:
            answer.model = lora.lora_name.rpartition("#")[0]
        return answer

    async def has_chat_template(self) -> bool:
        """Whether vLLM finds a chat template for the model, in the model's files or among its own."""
        try:
            response = await self.render_chat(self.chat(messages=[{"role": "user", "content": "Hello"}]))
        except Exception as error:  # noqa: BLE001 - any error raised by a template shows that there is one
            return MISSING not in str(error)
        return not (isinstance(response, self.refusal) and MISSING in response.error.message)


def of_vllm(name: str) -> Any:
    """What the installed version of vLLM has under `name`, wherever it keeps it."""
    for module in MOVED[name]:
        try:
            return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)
        except (ModuleNotFoundError, AttributeError) as error:
            missing = error
    raise ImportError(f"this version of vLLM has no {name} where versions 0.26 to 0.33 have it") from missing


def request_types() -> tuple[Any, Any]:
    """vLLM's types of chat and completion requests, extended by parameters that only its engine knows."""
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


def with_complete_logprobs(serving: Any) -> Any:
    """vLLM's handler of text completions, changed to return the likeliest tokens as a list too.

    The protocol for texts has a dict by token text, and several tokens may have the same text.
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
    """Tokenise short texts without vLLM's thread."""
    in_thread = renderer.tokenize_prompts_async

    async def tokenize(prompts: list[Any], params: Any) -> Any:
        if all(len(prompt.get("prompt") or ()) <= SHORT for prompt in prompts):
            return renderer.tokenize_prompts(prompts, params)
        return await in_thread(prompts, params)

    renderer.tokenize_prompts_async = tokenize


class Refused(Exception):
    """An error response of vLLM's server, with its message and status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def error_of(error: Exception) -> session.Frame:
    """A row's error as the fields of a `RowError`, with the message of vLLM's server."""
    from pydantic import ValidationError

    if isinstance(error, of_vllm("GenerationError")):
        return {"kind": "engine", "message": f"vLLM ended the row early ({error})", "retryable": True}
    if isinstance(error, Refused):
        words, code = str(error), error.code
    else:
        response = of_vllm("create_error_response")(error).error
        words, code = response.message, response.code
    if isinstance(error, ValidationError):
        words = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
    if code >= 500:
        return {"kind": "engine", "message": reason_of(error)[:2000]}
    return {"kind": "refused", "message": words[:2000]}


class Unusable(Exception):
    """The adapter that a call names cannot be used."""


class Adapters:
    """LoRA adapters by name and contents. Each gets its own number, name and copy.

    vLLM identifies an adapter by its number, and in the prefix cache by its name. It reads the folder again
    whenever other adapters have displaced this one. A folder changed by then would mix answers, and a missing
    one would end the engine. So the folder is copied now and loaded before a row needs it, where a failure
    affects only the call.
    """

    def __init__(self, engine: Any, models: Any) -> None:
        self.engine = engine
        self.models = models  # of vLLM's server, which also assigns numbers, to `default_mm_loras`
        self.loads: dict[str, asyncio.Task[Any]] = {}

    async def request(self, given: Any) -> Any:
        """vLLM's request for the adapter `given`, with its folder's current contents. Raises `Unusable`."""
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
                raise Unusable("the engine accepts adapters only with vllm_kwargs={'enable_lora': True}")
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
            del self.loads[key]  # the next call may succeed
            words = str(error) if isinstance(error, Unusable) else reason_of(error)
            raise Unusable(f"the adapter {wanted['lora_name']!r} cannot be used: {words}") from error
        return request


Stamps = list[tuple[int, int, int]]


def stamps(folder: str) -> Stamps:
    """Sizes and times of an adapter's files, which show changes. Empty if the folder is not local."""
    files = [Path(folder).expanduser() / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)]
    found = [file.stat() for file in files if file.is_file()]
    return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]


def copied(folder: Path, number: int, given: str, found: Stamps) -> Path:
    """Copy the adapter in `folder`, `given` by the call, to a folder that is removed with the engine.

    Raises `Unusable` if its files are no longer those that were `found`: the copy may mix old and new ones.
    """
    weights = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / ADAPTER_CONFIG).is_file():
        what = "has no" if folder.is_dir() else "is not a folder with"
        raise Unusable(f"{folder} {what} {ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}")
    copy = Path(os.environ[session.SOCKETS]) / f"adapter-{number}"
    copy.mkdir()
    for name in (ADAPTER_CONFIG, *weights):
        shutil.copyfile(folder / name, copy / name)
    if stamps(given) != found:
        raise Unusable(f"{folder} was written to while it was copied; run the call again when it is complete")
    return copy


def reason_of(error: BaseException) -> str:
    """The outermost error with a message. vLLM wraps some causes in errors without one."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def without_vllm(error: BaseException) -> str:
    """What to do if `error` shows that this environment has no vLLM; else empty."""
    if not (isinstance(error, ModuleNotFoundError) and error.name == "vllm"):
        return ""
    return (
        f"there is no vLLM in the environment of {sys.executable}: install vllm there, "
        "or give the Python of an environment that has it (engine_python, VLLM_TASKS_ENGINE_PYTHON)"
    )


def killed(engine: Any) -> str:
    """The engine's processes that a signal has ended, which leaves nothing in the log. Empty for none."""
    manager = engine.engine_core.resources.engine_manager
    ends = {} if manager is None else manager.finished_procs()
    found = [f"{name} was ended by {session.signal_words(-code)}" for name, code in ends.items() if code < 0]
    return "; ".join(words for words in found if signal.SIGTERM.name not in words)


async def start_engine(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Start an AsyncLLM with these arguments. Returns it and the state of vLLM's server over it.

    The arguments are those of the engine, and those of the server that affect answers. An unknown one is
    refused, with the nearest name.
    """
    from starlette.datastructures import State
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    of_engine, of_server = (
        {f.name for f in dataclasses.fields(c)} for c in (AsyncEngineArgs, of_vllm("BaseFrontendArgs"))
    )
    for name in sorted(arguments.keys() - of_engine - of_server):
        near = difflib.get_close_matches(name, of_engine | of_server, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"vllm_kwargs has {name!r}, which is not an engine argument of vLLM{hint}")
    # As in vLLM's `LLM`, for bulk work: no statistics for each step, and larger default batches.
    quiet = {"enable_log_requests": False, "disable_log_stats": True}
    given = {**quiet, **TRUSTED, **arguments}
    engine_args = AsyncEngineArgs(**{name: given[name] for name in given.keys() & of_engine})
    server_args = of_vllm("FrontendArgs")(**{name: given[name] for name in given.keys() & of_server})
    both = argparse.Namespace(**{**vars(server_args), **vars(engine_args)})
    if isinstance(both.served_model_name, str):
        both.served_model_name = [both.served_model_name]  # as from the server's command line
    of_vllm("validate_parsed_serve_args")(both)
    for plugin, manager in (
        (both.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (both.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if plugin:
            manager(plugin)
    engine = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
    state = State()
    await of_vllm("init_app_state")(engine, state, both, ("generate",))
    return engine, state


def facts_of(engine: Any) -> session.Frame:
    import vllm

    config = engine.vllm_config
    return {
        "vllm": vllm.__version__,
        "ranks": len(engine.engine_core.core_engines),  # of data parallelism, each with its own rows
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }


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
        engine, serving = await start_engine(arguments)
        host = Host(engine, serving, write)
    except BaseException as error:
        write({"failed": without_vllm(error) or reason_of(error)})
        await writer.drain()
        raise
    write({"ready": {**facts_of(engine), "chat_template": await host.has_chat_template()}})
    # The host must end with whichever of these ends first, even by an error.
    parts = take_frames(reader, host), dead.wait(), host.report_progress()
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
