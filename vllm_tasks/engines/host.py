"""The process that holds one vLLM engine, started and spoken to by `vllm_tasks.engines.local`.

All contact with vLLM's Python API is in this file. It is run by its path and imports nothing of
`vllm_tasks`, so that it starts without Prefect. Written for and tested with vLLM 0.32.

It talks over one socket in frames, a 4-byte length and JSON. To it: the engine arguments, then
`{"chunk": [[row, prompt], ...], "sampling": {...}}` and `{"cancel": [row, ...]}`. From it:
`{"ready": {...}}` or `{"failed": reason}`, then `{"row": row, "completion" | "error": {...}}` or, for a row
of which the call is wrong, `{"row": row, "invalid": reason}`; `{"progress": tokens}` while rows get on, and
`{"dead": reason}` when the engine died. The end of the socket, or of the parent, ends it.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import difflib
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Never

PARENT_CHECKED_EVERY = 0.5
"""Seconds between two looks at whether the parent still lives."""
SHUTDOWN_GRACE = 10.0
"""Seconds that an orderly shutdown may take before the whole session is killed."""
ENGINE_GRACE = 8.0
"""Seconds of these for vLLM's own processes: one that is killed leaves a file in the temporary folder."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's name of the folder where its processes meet. It leaves its sockets there, one or two a start."""
OWN = "vllm-"
"""How a folder for the sockets of one engine begins: short, as the path of a socket has 107 bytes at most."""
TOLD_EVERY = 0.5
"""Seconds between two looks at whether the rows have got on."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Files of a LoRA adapter, as vLLM looks for them."""
MISSING = "must provide a chat template"
"""How vLLM says that a model has none."""
SHORT = 2048
"""Characters of a text that is tokenised at once: vLLM's way through a thread costs more than such a text."""
CHAT_NAMES = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "documents",
    "mm_processor_kwargs",
)
"""Parameters of a chat request that act before sampling; named as in vLLM's chat protocol."""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
"""System call, request and feature by which a process on x86-64 asks Linux for AMX's registers:
https://docs.kernel.org/arch/x86/xstate.html"""

PR_SET_PDEATHSIG = 1
"""Request by which a process asks Linux for a signal at its parent's death:
https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html"""

Frame = dict[str, Any]


def permit_amx() -> None:
    """Ask for AMX, which vLLM 0.32 uses for attention in bfloat16 without having asked.

    Its worker then dies of SIGILL, unless another library has asked in the same process before. Without
    AMX, or on another machine, the system call fails and nothing else happens.
    """
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)


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
    permit_amx()
if __name__ == "__mp_main__":
    die_with_parent()


class Host:
    """One engine and the rows it works on."""

    def __init__(self, engine: Any, write: Any) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        self.engine = engine
        self.write = write
        self.adapters = Adapters(engine)
        self.death, self.refusals = EngineDeadError, (VLLMClientError, ValueError, TypeError)
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.defaults = engine.model_config.get_diff_sampling_param()
        self.reasoning = reasoning_parser(engine)

    def start_chunk(self, frame: Frame) -> None:
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

    def cancel(self, frame: Frame) -> None:
        """Abort rows that nobody waits for any more."""
        for row in frame["cancel"]:
            if task := self.tasks.get(row):
                task.cancel()

    async def answer(
        self, row: int, prompt: str | list[Any], sampling: dict[str, Any], accepted: float
    ) -> None:
        """Tell what became of a row, whatever that is."""
        try:
            completion = await self.complete(str(row), prompt, sampling)
            self.write({"row": row, "completion": {**completion, "seconds": time.perf_counter() - accepted}})
        except Unusable as error:
            self.write({"row": row, "invalid": str(error)[:2000]})
        except self.death as error:
            self.write({"dead": killed(self.engine) or reason_of(error)})
        except self.refusals as error:
            self.write({"row": row, "error": {"kind": kind_of(error), "message": str(error)[:2000]}})
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises for a row is that row's error
            self.write({"row": row, "error": {"kind": "engine", "message": reason_of(error)[:2000]}})

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

    async def complete(self, request_id: str, prompt: str | list[Any], sampling: dict[str, Any]) -> Frame:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        extras = {name: sampling.pop(name) for name in CHAT_NAMES if name in sampling}
        lora = await self.adapters.request(sampling.pop("lora_request", None))
        priority = sampling.pop("priority", 0)
        if bias := sampling.get("logit_bias"):
            # JSON has text keys.
            sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
        if isinstance(structured := sampling.get("structured_outputs"), Mapping):
            sampling["structured_outputs"] = StructuredOutputsParams(**structured)
        # They are this row's own, so vLLM need not copy them deeply.
        own = {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True}
        params = SamplingParams(**{**self.defaults, **sampling}, **own)
        rendered = await (
            self.render_text(prompt) if isinstance(prompt, str) else self.render_chat(prompt, extras)
        )
        outputs = self.engine.generate(rendered, params, request_id, lora_request=lora, priority=priority)
        return self.frame_of([output async for output in outputs][-1])  # FINAL_ONLY: there is one

    async def render_text(self, prompt: str) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        parsed = [parse_model_prompt(self.engine.model_config, prompt)]
        renderer = self.engine.renderer
        short = len(prompt) <= SHORT
        (rendered,) = renderer.render_cmpl(parsed) if short else await renderer.render_cmpl_async(parsed)
        return rendered

    async def render_chat(self, messages: list[Any], extras: dict[str, Any]) -> Any:
        from vllm.renderers import ChatParams
        from vllm.utils.mistral import is_mistral_tokenizer

        renderer = self.engine.renderer
        template_kwargs = {
            "tokenize": is_mistral_tokenizer(renderer.tokenizer),
            "add_generation_prompt": extras.get("add_generation_prompt", True),
            "continue_final_message": extras.get("continue_final_message", False),
            "tools": extras.get("tools"),
            "documents": extras.get("documents"),
            **extras.get("chat_template_kwargs", {}),
        }
        mm = extras.get("mm_processor_kwargs")
        _, (rendered,) = await renderer.render_chat_async(
            [messages],
            ChatParams(
                chat_template=extras.get("chat_template"),
                chat_template_kwargs=template_kwargs,
                mm_processor_kwargs=mm,
            ),
            # As vLLM's chat server does: the template writes the special tokens itself.
            renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False),
            prompt_extras=None if mm is None else {"mm_processor_kwargs": mm},
        )
        return rendered

    async def has_chat_template(self) -> bool:
        """Whether vLLM finds a chat template for the model, in its files or of its own."""
        try:
            await self.render_chat([{"role": "user", "content": "Hello"}], {})
        except ValueError as error:
            return MISSING not in str(error)
        except Exception:  # noqa: BLE001 - whatever a template raises: there is one
            return True
        return True

    def frame_of(self, final: Any) -> Frame:
        """vLLM's RequestOutput as the fields of a `Completion`."""
        choices = [self.choice(output) for output in final.outputs]
        return {
            "choices": choices,
            "prompt_tokens": len(final.prompt_token_ids),
            "completion_tokens": sum(len(c["token_ids"]) for c in choices),
            "prompt_logprobs": final.prompt_logprobs
            and [entry and logprob_frame(entry, next(iter(entry))) for entry in final.prompt_logprobs],
        }

    def choice(self, output: Any) -> Frame:
        reasoning, text = self.reasoning(output.text)
        token_ids = list(output.token_ids)
        return {
            "text": text,
            "finish_reason": output.finish_reason,
            "token_ids": token_ids,
            "logprobs": output.logprobs
            and [logprob_frame(e, t) for e, t in zip(output.logprobs, token_ids, strict=True)],
            "reasoning": reasoning,
        }


def logprob_frame(entry: Mapping[int, Any], token_id: int) -> Frame:
    own = entry[token_id]
    return {
        "token": own.decoded_token,
        "logprob": own.logprob,
        "top": {p.decoded_token: p.logprob for p in entry.values()},
    }


def reasoning_parser(engine: Any) -> Any:
    """`text -> (reasoning, answer)` as the engine argument `reasoning_parser` says; else all is answer."""
    name = engine.vllm_config.structured_outputs_config.reasoning_parser
    if not name:
        return lambda text: (None, text)
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser(name)(engine.get_tokenizer())
    request = ChatCompletionRequest(messages=[])

    def split(text: str) -> tuple[str | None, str]:
        reasoning, answer = parser.extract_reasoning(text, request)
        return reasoning, answer or ""

    return split


class Unusable(Exception):
    """An adapter that a call names cannot be used."""


class Adapters:
    """LoRA adapters by name and contents: each has a number, a name and a copy of its own.

    To vLLM a number is one adapter for ever, a name one in its prefix cache, and a folder is read anew
    whenever others have taken an adapter's place: changed by then it would mix answers, gone it would end
    the engine. So what a folder has now is copied, and loaded before a row needs it, where a failure is the
    call's alone.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.numbers = itertools.count(1)
        self.loads: dict[str, asyncio.Task[Any]] = {}

    async def request(self, given: Any) -> Any:
        """vLLM's request for the adapter that is `given`, as its folder is now; raises `Unusable`."""
        if given is None:
            return None
        if not isinstance(given, Mapping) or not {"lora_name", "lora_path"} <= given.keys():
            raise Unusable(f"lora_request={given!r:.200} must have lora_name and lora_path")
        wanted = {name: v for name, v in given.items() if name not in ("lora_int_id", "load_inplace")}
        key = json.dumps([wanted, stamps(wanted["lora_path"])], sort_keys=True)
        if key not in self.loads:
            self.loads[key] = asyncio.create_task(self.load(wanted, next(self.numbers)))
        try:
            return await asyncio.shield(self.loads[key])
        except Unusable:
            self.loads.pop(key, None)  # its cause may be gone at the next call
            raise

    async def load(self, wanted: dict[str, Any], number: int) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.lora.utils import get_adapter_absolute_path
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            if self.engine.vllm_config.lora_config is None:
                raise Unusable("the engine takes none without vllm_kwargs={'enable_lora': True}")
            folder = await asyncio.to_thread(get_adapter_absolute_path, wanted["lora_path"])
            copy = await asyncio.to_thread(copied, Path(folder), number)
            name = f"{wanted['lora_name']}#{number}"
            own = {"lora_name": name, "lora_int_id": number, "lora_path": str(copy)}
            request = LoRARequest(**{**wanted, **own})
            await self.engine.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:
            words = str(error) if isinstance(error, Unusable) else reason_of(error)
            raise Unusable(f"the adapter {wanted['lora_name']!r} cannot be used: {words}") from error
        return request


def stamps(folder: str) -> list[tuple[int, int, int]]:
    """What tells the contents of an adapter's folder from those before; nothing where it is not here."""
    files = [Path(folder).expanduser() / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)]
    found = [file.stat() for file in files if file.is_file()]
    return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]


def copied(folder: Path, number: int) -> Path:
    """A copy of the adapter in `folder` that goes with the engine."""
    weights = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / ADAPTER_CONFIG).is_file():
        what = "has no" if folder.is_dir() else "is no folder with"
        raise Unusable(f"{folder} {what} {ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}")
    copy = Path(os.environ[SOCKETS]) / f"adapter-{number}"
    copy.mkdir()
    for name in (ADAPTER_CONFIG, *weights):
        shutil.copyfile(folder / name, copy / name)
    return copy


def kind_of(error: Exception) -> str:
    return "too_long" if "maximum context length" in str(error) else "refused"


def reason_of(error: BaseException) -> str:
    """The outermost error that has words; vLLM wraps some causes in errors without any."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def killed(engine: Any) -> str:
    """Which process of the engine was ended by a signal, which leaves no word in the log; empty for none."""
    manager = engine.engine_core.resources.engine_manager
    ends = {} if manager is None else manager.finished_procs()
    found = [f"{name} was ended by {signal_words(-code)}" for name, code in ends.items() if code < 0]
    return "; ".join(words for words in found if signal.SIGTERM.name not in words)


def signal_words(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often the kernel, out of memory)" if number == signal.SIGKILL else name


def start_engine(arguments: dict[str, Any]) -> Any:
    """An AsyncLLM with these engine arguments; an unknown one is refused with the nearest name."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
    for name in sorted(arguments.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"vllm_kwargs has {name!r}, which vLLM's engine arguments do not know{hint}")
    # As vLLM's `LLM` does for work in bulk: no statistics a step, and its larger default batches.
    quiet = {"enable_log_requests": False, "disable_log_stats": True}
    engine_args = AsyncEngineArgs(**{**quiet, **arguments})
    return AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)


def facts_of(engine: Any) -> Frame:
    import vllm

    config = engine.vllm_config
    return {
        "vllm": vllm.__version__,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }


async def serve(channel: socket.socket) -> None:
    """Start the engine and answer frames until the other end is closed or the engine dies."""
    reader, writer = await asyncio.open_connection(sock=channel)

    def write(frame: Frame) -> None:
        data = json.dumps(frame).encode()
        writer.write(struct.pack("!I", len(data)) + data)
        if "dead" in frame:
            dead.set()

    dead = asyncio.Event()
    arguments = await read_frame(reader)
    try:
        engine = start_engine(arguments)
        host = Host(engine, write)
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
            frame = await read_frame(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        host.cancel(frame) if "cancel" in frame else host.start_chunk(frame)


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    frame: Frame = json.loads(await reader.readexactly(size))
    return frame


def leave_with(parent: int) -> None:
    """Watch over the parent; when it is gone, shut down in order, or else by force.

    vLLM's own processes outlive a killed parent. This thread also works while the engine is
    still loading, when the event loop is blocked.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECKED_EVERY)
    # The socket's end has been seen by the event loop too; give an orderly shutdown its time.
    time.sleep(SHUTDOWN_GRACE)
    end_session(1)


def end_session(code: int) -> Never:
    """Kill what is left of this process's session, remove its sockets, then exit."""
    kill_session(os.getsid(0))
    remove_sockets(os.environ.get(SOCKETS, ""))
    os._exit(code)


def new_sockets() -> str:
    """A folder for the sockets of one engine: what goes as `SOCKETS` into its environment."""
    return tempfile.mkdtemp(prefix=OWN, dir=os.environ.get(SOCKETS))


def remove_sockets(folder: str) -> None:
    """Remove a folder of `new_sockets`: by who made it, and by the engine, whose parent may be killed."""
    if Path(folder).name.startswith(OWN):
        shutil.rmtree(folder, ignore_errors=True)


def kill_session(session: int) -> None:
    """Kill every process of a session but the caller.

    Spared is multiprocessing's resource tracker: it ends by itself when the others are gone,
    after it has removed their shared memory.
    """
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.getsid(pid) != session or pid == os.getpid():
                continue
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            continue  # it ended meanwhile


if __name__ == "__main__":
    channel = socket.socket(fileno=int(sys.argv[1]))
    # Where vLLM forks (its default on GPUs), a copy of our end would hide our death from the parent.
    os.register_at_fork(after_in_child=partial(os.close, channel.fileno()))
    os.register_at_fork(after_in_child=die_with_parent)
    threading.Thread(target=leave_with, args=(int(sys.argv[2]),), daemon=True).start()
    code = 1
    try:
        asyncio.run(serve(channel))
        code = 0
    finally:
        end_session(code)
