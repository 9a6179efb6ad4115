"""The sampling parameters that vLLM knows, for each way to reach it."""

from __future__ import annotations

import difflib
import functools
import logging
import re
import symtable
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from vllm_tasks.calls.sampling_table import (
    CHAT_REQUEST,
    COMPLETION_REQUEST,
    POOLING_CHAT,
    POOLING_REQUEST,
    SAMPLING_PARAMS,
    TABLE_VERSION,
)
from vllm_tasks.engines.http.control import release_of
from vllm_tasks.engines.local.python import source_of_vllm
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Task, is_chat

logger = logging.getLogger(__name__)

Target = Literal["local", "legacy", "completions", "chat", "openai", "embed", "score", "classify", "reward"]
"""What takes the parameters. `local` is the engine and the next four are HTTP protocols, all for generated
text; `openai` means `completions` or `chat`. The others are the tasks that return numbers, which take the
same parameters of an engine and of a server."""

OWNED = {
    "model": "set the model's own field",
    "prompt": "the prompt is made from the rows",
    "messages": "the messages are made from the rows",
    "stream": "calls return complete answers; the field stream of VllmAPI keeps connections alive meanwhile",
    "stream_options": "calls return complete answers",
    "output_kind": "calls return complete answers",
    "request_id": "each row has its own",
    "detokenize": "answers are texts",
    "skip_clone": "it is internal to vLLM",
    "output_text_buffer_length": "it is internal to vLLM",
    "flat_logprobs": "logprobs are returned as a list",
    **dict.fromkeys(("input", "text_1", "text_2"), "it is made from the rows"),
    **dict.fromkeys(("encoding_format", "embed_dtype", "endianness"), "vectors are numbers of 32 bits"),
}
"""Names that vLLM knows and that a caller cannot set, with the reason."""
LOCAL_EXTRAS = frozenset({"lora_request"})
"""Names that the local engine takes in addition to those of vLLM's engine and server."""
LEGACY_EXTRAS = {"best_of", "use_beam_search", "length_penalty", "early_stopping"}
"""Names that only servers with the legacy format, which are all old versions, still take."""
REMOVED = {
    "best_of": "vLLM removed it in 0.12; request n answers and choose by their logprobs",
    "early_stopping": "vLLM's beam search (use_beam_search=True) has not taken it since 0.8.5 or earlier",
    "guided_decoding": "vLLM removed it in 0.12; use structured_outputs={'json': schema}",
    "guided_json": "vLLM removed it in 0.12; use structured_outputs={'json': schema}",
    "guided_regex": "vLLM removed it in 0.12; use structured_outputs={'regex': pattern}",
    "guided_choice": "vLLM removed it in 0.12; use structured_outputs={'choice': [...]}",
    "guided_grammar": "vLLM removed it in 0.12; use structured_outputs={'grammar': grammar}",
    "logits_processors": "vLLM removed it per request in 0.17; use vllm_kwargs={'logits_processors': [...]}",
    "max_new_tokens": "it is a name of transformers; vLLM's name is max_tokens",
    "normalize": "vLLM's name is use_activation",
    "prompt_adapter_request": "vLLM removed prompt adapters; use lora_request",
}
"""Names from older versions and other libraries, with the replacement."""
OWNED_BY_TASK: dict[tuple[Target, str], str] = {
    ("classify", "use_activation"): "answers are probabilities, which have an activation; without one, "
    "task='reward' returns the number of a model with one class",
}
"""Names that a caller cannot set for one task, with the reason."""
FRONTEND = "common/cli_args.py", "launchers/cli_args.py", "openai/cli_args.py"
"""The files that may hold the server's arguments, in vLLM 0.26 to 0.33."""


@functools.cache
def known_names(target: Target, python: str = "") -> frozenset[str]:
    """Return all names that may be set for `target`.

    They are those of the vLLM that the interpreter `python` has, this process's if it is empty. Without one
    they come from a dated table.
    """
    if target in POOLING_REQUEST:
        return POOLING_REQUEST[target] - {name for task, name in OWNED_BY_TASK if task == target}
    if target == "local":
        of_engine = _fields(python, "sampling_params.py", "SamplingParams") or SAMPLING_PARAMS
        return (of_engine - OWNED.keys()) | known_names("openai", python) | LOCAL_EXTRAS
    if target == "legacy":
        return (SAMPLING_PARAMS - OWNED.keys()) | LEGACY_EXTRAS
    if target == "openai":
        return known_names("completions", python) | known_names("chat", python)
    if target == "completions":
        path, name, table = "completion/protocol.py", "CompletionRequest", COMPLETION_REQUEST
    else:
        path, name, table = "chat_completion/protocol.py", "ChatCompletionRequest", CHAT_REQUEST
    return (_fields(python, f"entrypoints/openai/{path}", name) or table) - OWNED.keys()


def task_of(target: Target) -> Task:
    """Return the task of the requests that take the parameters of `target`."""
    return target if target in POOLING_REQUEST else "generate"


def check_names(
    names: Iterable[str],
    target: Target,
    python: str = "",
    server_version: Callable[[], str | None] = lambda: None,
) -> None:
    """Raise `InvalidCall` for the first name that vLLM does not know for `target`, with a hint.

    Servers accept unknown fields silently, so a misspelt name would have no effect and nobody would notice.
    A server that is newer than the known names may know more: it gets the name, with a warning.
    `server_version` is called only for an unknown name.
    """
    known = known_names(target, python)
    for name in names:
        if name in known:
            continue
        if why := OWNED.get(name) or REMOVED.get(name) or OWNED_BY_TASK.get((target, name)):
            raise InvalidCall(f"sampling parameter {name!r} cannot be set: {why}")
        if target == "completions" and name in known_names("chat"):
            raise InvalidCall(f"{name!r} is for chat messages, and the prompts are texts; set chat=True")
        if target == "chat" and name in known_names("completions"):
            raise InvalidCall(f"{name!r} is for text prompts, and the prompts are chat messages")
        if target in POOLING_REQUEST and name in known_names("local", python):
            raise InvalidCall(
                f"{name!r} is for generated text, and a model with task={target!r} returns numbers: leave it "
                "out, or set another task"
            )
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
        if _may_know(name, server_version(), hint):
            continue
        raise InvalidCall(f"vLLM does not know the sampling parameter {name!r} ({target}); {hint}")


def _may_know(name: str, server: str | None, hint: str) -> bool:
    """Whether the server is newer than the known names; warns once of the name if so."""
    release, known = release_of(server or ""), release_of(names_version())
    if release is None or known is None or release <= known:
        return False
    _warn(name, f"vLLM {server} of the server is newer than the names of vLLM {names_version()}; {hint}")
    return True


@functools.cache
def _warn(name: str, why: str) -> None:
    logger.warning("the sampling parameter %r is not known here, and sent as it is: %s", name, why)


def check_prompts(prompts: Iterable[object], sampling: Mapping[str, Any], target: Target) -> None:
    """Raise `InvalidCall` if the prompts (texts or chat messages) and the parameters do not go together.

    `check_names` has already checked the names themselves.
    """
    found = [prompt for prompt in prompts if isinstance(prompt, str | list)]
    kinds = {list if is_chat(prompt) else str for prompt in found}
    if target in ("legacy", "chat") and any(isinstance(p, list) and not is_chat(p) for p in found):
        raise InvalidCall(
            f"the path of api_url ({target}) takes no token ids, which are for completions: use the server's "
            "base URL"
        )
    if list in kinds and target in ("legacy", "completions"):
        raise InvalidCall(
            f"the path of api_url ({target}) takes texts, not chat messages; use the server's base URL"
        )
    if target in POOLING_REQUEST and str in kinds and (names := sorted(sampling.keys() & POOLING_CHAT)):
        raise InvalidCall(f"{names[0]!r} is for chat messages, and the prompts are texts; set chat=True")
    if target in ("openai", "local"):
        # A name may be for one kind of prompt only; the local engine's extra names are for both.
        names = sorted(sampling.keys() & known_names("openai"))
        for kind in kinds:
            check_names(names, "completions" if kind is str else "chat")


def of_one_kind(names: Iterable[str]) -> bool | None:
    """Return the kind of prompt that the names are for: True for a name that only chat messages take, False
    for one that only texts take, None for neither."""
    chat, text = known_names("chat"), known_names("completions")
    own = set(names) & (chat ^ text)
    return bool(own & chat) if own else None


@functools.cache
def names_version() -> str:
    """Return the version of vLLM whose names are known: that of the installed one, or of the tables."""
    source = source_of_vllm("")
    path = source and source / "_version.py"
    if path and path.exists():
        found = re.search(r"^__version__ = .*'(.+)'", path.read_text(), re.MULTILINE)
        return found[1] if found else TABLE_VERSION
    return TABLE_VERSION


def engine_arguments(python: str) -> frozenset[str] | None:
    """Return the names that `vllm_kwargs` may have with the vLLM of the interpreter `python`, as
    `engines/local/vllm_server.py` checks them; None if it is not on this machine, or keeps them elsewhere."""
    of_engine = [_fields(python, "engine/arg_utils.py", name) for name in ("EngineArgs", "AsyncEngineArgs")]
    of_server = [
        next(filter(None, (_fields(python, f"entrypoints/{file}", name) for file in FRONTEND)), None)
        for name in ("BaseFrontendArgs", "FrontendArgs")
    ]
    found = [names for names in (*of_engine, *of_server) if names is not None]
    return frozenset().union(*found) if len(found) == 4 else None


@functools.cache
def _fields(python: str, file: str, class_name: str) -> frozenset[str] | None:
    """Return the annotated fields of a class of the vLLM that `python` has, or None if it has none here.

    It reads the source because importing vLLM would take seconds and hundreds of megabytes, and its table of
    symbols because `ast.parse` fails at times in Python 3.11 while other threads parse.
    """
    source = source_of_vllm(python)
    if source is None or not (path := source / file).exists():
        return None
    for scope in symtable.symtable(path.read_text(), file, "exec").get_children():
        if isinstance(scope, symtable.Class) and scope.get_name() == class_name:
            annotated = (symbol.get_name() for symbol in scope.get_symbols() if symbol.is_annotated())
            return frozenset(name for name in annotated if not name.startswith("_"))
    return None
