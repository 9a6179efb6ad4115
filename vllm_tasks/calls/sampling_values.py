"""The values that vLLM takes for sampling parameters: others are refused before a row is sent.

A server would refuse every row for the same value, and each row would have an error of its own.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from vllm_tasks.errors import InvalidCall

Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1)]
NumberOrAll = Annotated[int, Field(ge=-1)]
"""A number of tokens for which log probabilities are returned; -1: all of the vocabulary."""


class Values(BaseModel):
    """Types and limits of vLLM's `SamplingParams` and of its server's requests, in versions 0.27 to 0.32.

    As in vLLM's server, a text may be a number. Only `n` may not, because it is read here, too.
    """

    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: NumberOrAll | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    logprobs: NumberOrAll | None = None
    top_logprobs: NumberOrAll | None = None
    prompt_logprobs: NumberOrAll | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[Any, float] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


def check_values(sampling: Mapping[str, Any]) -> None:
    """Raise `InvalidCall` for the first value that vLLM does not take, or that JSON has no form for."""
    for name, value in sampling.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            schema = ", or output_schema=CLASS.model_json_schema()" if isinstance(value, type) else ""
            raise InvalidCall(
                f"the sampling parameter {name}={reprlib.repr(value)} cannot be sent as JSON ({error}): give "
                f"texts, finite numbers, lists and dicts{schema}"
            ) from error
    # A prompt that is only echoed has no tokens of an answer.
    checked = {
        n: v for n, v in sampling.items() if not (n == "max_tokens" and v == 0 and sampling.get("echo"))
    }
    try:
        Values.model_validate(checked)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise InvalidCall(
            f"vLLM does not take the sampling parameter {name}={reprlib.repr(sampling[name])}: {first['msg']}"
        ) from wrong
