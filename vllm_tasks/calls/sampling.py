"""Which sampling parameters vLLM knows, for each way to reach it."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_tasks.calls.sampling_table import CHAT_REQUEST, COMPLETION_REQUEST, SAMPLING_PARAMS
from vllm_tasks.errors import InvalidCall

Target = Literal["local", "legacy", "completions", "chat", "openai"]
"""The engine's own parameters, or an HTTP protocol; `openai` means either of its two."""

OWNED = {
    "model": "set the model's own field",
    "prompt": "the prompt is made from the rows",
    "messages": "the messages are made from the rows",
    "stream": "answers are awaited whole; the field stream of VllmAPI keeps connections alive meanwhile",
    "stream_options": "answers are awaited whole",
    "output_kind": "answers are awaited whole",
    "request_id": "each row gets its own",
    "detokenize": "answers are texts",
    "skip_clone": "it is vLLM's own",
    "output_text_buffer_length": "it is vLLM's own",
    "flat_logprobs": "logprobs come as a list",
}
"""Names that vLLM knows and that are not the caller's to set, with the reason."""
LOCAL_EXTRAS = frozenset({"lora_request"})
"""What the local engine takes beside what vLLM's engine and its server do."""
LEGACY_EXTRAS = {"best_of", "use_beam_search", "length_penalty", "early_stopping"}
"""Names that only servers with the legacy format, all of old versions, still take."""
GONE = {
    "best_of": "vLLM dropped it in 0.12; ask for n answers and choose by their logprobs",
    "early_stopping": "vLLM's beam search (use_beam_search=True) takes it no longer since before 0.8.5",
    "guided_decoding": "vLLM dropped it in 0.12; use structured_outputs={'json': schema}",
    "guided_json": "vLLM dropped it in 0.12; use structured_outputs={'json': schema}",
    "guided_regex": "vLLM dropped it in 0.12; use structured_outputs={'regex': pattern}",
    "guided_choice": "vLLM dropped it in 0.12; use structured_outputs={'choice': [...]}",
    "guided_grammar": "vLLM dropped it in 0.12; use structured_outputs={'grammar': grammar}",
    "logits_processors": "vLLM dropped it per request in 0.17; use vllm_kwargs={'logits_processors': [...]}",
    "max_new_tokens": "the transformers name; vLLM's is max_tokens",
    "prompt_adapter_request": "vLLM dropped prompt adapters; use lora_request",
}
"""Names that people bring from older versions and other libraries, with what to do instead."""


def known_names(target: Target) -> frozenset[str]:
    """Every name that may be set for `target`."""
    if target == "local":
        of_engine = _fields("sampling_params.py", "SamplingParams") or SAMPLING_PARAMS
        return (of_engine - OWNED.keys()) | known_names("openai") | LOCAL_EXTRAS
    if target == "legacy":
        return (SAMPLING_PARAMS - OWNED.keys()) | LEGACY_EXTRAS
    if target == "openai":
        return known_names("completions") | known_names("chat")
    if target == "completions":
        path, name, table = "completion/protocol.py", "CompletionRequest", COMPLETION_REQUEST
    else:
        path, name, table = "chat_completion/protocol.py", "ChatCompletionRequest", CHAT_REQUEST
    return (_fields(f"entrypoints/openai/{path}", name) or table) - OWNED.keys()


def check_names(names: Iterable[str], target: Target) -> None:
    """Raise `InvalidCall` for the first name that vLLM does not know for `target`, with a hint.

    Servers accept unknown fields in silence, so a misspelt one would change nothing, unnoticed.
    """
    known = known_names(target)
    for name in names:
        if name in known:
            continue
        if name in OWNED or name in GONE:
            raise InvalidCall(f"sampling parameter {name!r} cannot be set: {OWNED.get(name) or GONE[name]}")
        if target == "completions" and name in known_names("chat"):
            raise InvalidCall(f"{name!r} is for chat messages, and there are text prompts; set chat=True")
        if target == "chat" and name in known_names("completions"):
            raise InvalidCall(f"{name!r} is for text prompts, and there are chat messages")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
        raise InvalidCall(f"vLLM knows no sampling parameter {name!r} ({target}); {hint}")


def check_prompts(prompts: Iterable[object], sampling: Mapping[str, Any], target: Target) -> None:
    """Raise `InvalidCall` for what could not be sent beside such prompts, texts or chat messages.

    The names themselves have been checked by `check_names`.
    """
    kinds = {str if isinstance(p, str) else list for p in prompts if isinstance(p, str | list)}
    if list in kinds and target in ("legacy", "completions"):
        raise InvalidCall(
            f"the path of api_url ({target}) takes texts, no chat messages; use the server's base URL"
        )
    if target in ("openai", "local"):
        # Of either kind; what a local engine takes beside them goes with both.
        names = sorted(sampling.keys() & known_names("openai"))
        for kind in kinds:
            check_names(names, "completions" if kind is str else "chat")


def of_one_kind(names: Iterable[str]) -> bool | None:
    """Whether a name that only one kind of prompt takes is among them: True for one of chat messages, False
    for one of texts, None for neither."""
    chat, text = known_names("chat"), known_names("completions")
    own = set(names) & (chat ^ text)
    return bool(own & chat) if own else None


@functools.cache
def _fields(file: str, class_name: str) -> frozenset[str] | None:
    """The annotated fields of a class of the installed vLLM, read from its source; None without it.

    Importing vLLM for this would take seconds and hundreds of megabytes.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        return None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            targets = (s.target for s in node.body if isinstance(s, ast.AnnAssign))
            return frozenset(t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_"))
    return None
