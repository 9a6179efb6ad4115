"""The lines of an OpenAI batch file, each of them one request: `custom_id`, `method`, `url` and `body`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_tasks.calls.prompt_func import described
from vllm_tasks.engines import wire
from vllm_tasks.rows import Request

OF_THE_RUN = {"model"}
"""Fields of a body that a run sets itself."""
NOT_OF_ROWS = {"chat_template", "lora_request", "media_io_kwargs", "mm_processor_kwargs"}
"""Parameters that a body may not have: a template that the engine would run, a folder that it would read, and
sizes to which it would unpack pictures. vLLM's server refuses most of them from its clients, too."""


def batch_request(body: Mapping[str, Any] | str) -> Request:
    """Return the request in the `body` of a line of an OpenAI batch file.

    It is a `prompt_func` for the column `body` of such a file, whose `primary_id` is `custom_id`. All fields
    of a body except `model` are parameters of the row's own. The model that is called answers.

    Args:
        body: The body of a chat or text completion, as data or as JSON text.

    Returns:
        The request.

    Raises:
        ValueError: The body is not that of a completion, or has a parameter that only the call may set.
    """
    read = json.loads(body) if isinstance(body, str) else body
    if not isinstance(read, Mapping):
        raise ValueError(f"a body must be an object, got {described(read)}")
    given = {name: value for name, value in read.items() if value is not None}
    inner = given.get("chat_template_kwargs")
    names = {*given, *(inner if isinstance(inner, Mapping) else ())}
    if closed := sorted(names & NOT_OF_ROWS):
        raise ValueError(f"a body may not have {closed[0]}, which is more than data: set it for the call")
    if ("messages" in given) == ("prompt" in given):
        raise ValueError(
            f"a body of a chat has messages, that of a text completion a prompt; this one has {sorted(given)}"
        )
    prompt = given.pop("messages" if "messages" in given else "prompt")
    if given.get("stream") is False:  # some clients write it
        del given["stream"]
    return Request(prompt, {name: value for name, value in given.items() if name not in OF_THE_RUN})


# Its code counts in fingerprints, since it is a prompt_func, and may change while its requests do not.
batch_request.version = "1"  # type: ignore[attr-defined]


def line_of(custom_id: str, request: Request, model: str) -> str:
    """Return a request as a line of a batch file, which `batch_request` and vLLM's `run-batch` read."""
    body = wire.body_of(request, model)
    if adapter := body.pop("lora_request", None):  # of the local engine; a server knows it by its name
        body["model"] = adapter["lora_name"]
    line = {"custom_id": custom_id, "method": "POST", "url": wire.path_of("openai", request), "body": body}
    return json.dumps(line, ensure_ascii=False) + "\n"
