"""vLLM's engine and the handlers of its own server, in the process of `host`, which loads this file by path.

All code of the host that uses vLLM's Python API is here and in `adapters`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import runpy
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "session.py")))

SHORT = 2048
"""Characters of the longest text that is tokenised without a thread, which would cost more than the text."""
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
POOLING = {
    "embed": ("serving_embedding", "embed", "EmbeddingCompletionRequest", "EmbeddingChatRequest"),
    "score": ("serving_scores", "scoring", "ScoreTextRequest", "ScoreTextRequest"),
    **dict.fromkeys(
        ("classify", "reward"),
        (
            "serving_classification",
            "classify",
            "ClassificationCompletionRequest",
            "ClassificationChatRequest",
        ),
    ),
}
"""By task: the handler of vLLM's server, the module of its requests under `vllm.entrypoints.pooling`, and its
requests for a text and for chat messages."""


def of_vllm(name: str) -> Any:
    """What the installed version of vLLM has under `name`, wherever it keeps it."""
    for module in MOVED[name]:
        try:
            return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)
        except (ModuleNotFoundError, AttributeError) as error:
            missing = error
    raise ImportError(f"this version of vLLM has no {name} where versions 0.26 to 0.33 have it") from missing


async def start_engine(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Start an AsyncLLM with these arguments. Returns it and the state of vLLM's server over it.

    The arguments are those of the engine, and those of the server that affect answers. An unknown one is
    refused, with the nearest name.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            f"the environment of {sys.executable} has no vLLM: install it there, or name the Python of an "
            "environment that has it (engine_python, VLLM_TASKS_ENGINE_PYTHON)"
        )
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
    tasks = await engine.get_supported_tasks()
    await of_vllm("init_app_state")(engine, state, both, ("generate",) if "generate" in tasks else tasks)
    return engine, state


def pooling_handlers(serving: Any) -> dict[str, tuple[Any, Any, Any]]:
    """By each task other than `generate` that the model has: vLLM's handler and its types of requests."""
    found = {}
    for task, (handler, module, *requests) in POOLING.items():
        if there := getattr(serving, handler, None):
            protocol = importlib.import_module(f"vllm.entrypoints.pooling.{module}.protocol")
            found[task] = (there, *(getattr(protocol, name) for name in requests))
    return found


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


class Unsupported(Exception):
    """The model does not have the task of a call."""

    def __init__(self, task: str, tasks: Iterable[str]) -> None:
        there = ", ".join(map(repr, tasks)) or "none that vllm_tasks knows"
        super().__init__(
            f"the model does not have the task {task!r}; as vLLM runs it, it has {there}: set task"
        )


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
        return {"kind": "engine", "message": session.reason_of(error)[:2000]}
    return {"kind": "refused", "message": words[:2000]}


def killed(engine: Any) -> str:
    """The engine's processes that a signal has ended, which leaves nothing in the log. Empty for none."""
    manager = engine.engine_core.resources.engine_manager
    ends = {} if manager is None else manager.finished_procs()
    found = [f"{name} was ended by {session.signal_words(-code)}" for name, code in ends.items() if code < 0]
    return "; ".join(words for words in found if signal.SIGTERM.name not in words)


def facts_of(engine: Any) -> session.Frame:
    import vllm

    config = engine.vllm_config
    return {
        "vllm": vllm.__version__,
        "ranks": len(engine.engine_core.core_engines),  # of data parallelism, each with its own rows
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_model_len": config.model_config.max_model_len,
    }
