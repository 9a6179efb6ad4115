"""`VllmAPI`: the client of a running vLLM server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, field_validator

from vllm_tasks.calls.sampling import Target
from vllm_tasks.engines import wire
from vllm_tasks.engines.http.engine import HttpConfig
from vllm_tasks.engines.http.urls import origins, split_urls
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models.fields import FORBID, VLLM_DOCS
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.models.resources import Resources
from vllm_tasks.settings import Settings, site_settings

T = TypeVar("T")


class VllmAPI(Predictor, Block):
    """The client of a running vLLM server."""

    _block_type_name: ClassVar[str] = "vLLM API"
    _block_type_slug: ClassVar[str] = "vllm-api"
    _description: ClassVar[str] = "Prompts a model on a vLLM server."
    _documentation_url: ClassVar[Any] = f"{VLLM_DOCS}/serving/openai_compatible_server.html"
    _code_example: ClassVar[str] = """
        ```python
        from vllm_tasks import VllmAPI

        model = VllmAPI.load("BLOCK_NAME")
        answers = model.predict_batches(["What is the capital of France?"])
        ```
        """

    _reached_by: ClassVar[tuple[str, ...]] = ("api_url", "model", "api_key")

    model_config = FORBID

    api_url: str | list[str] = Field(
        default="",
        title="URL of the server",
        description="Such as http://host:8000; separate several by commas. The path selects the protocol: "
        "/generate, /v1/completions or /v1/chat/completions; without a path, the prompt decides which of "
        "OpenAI's two is used. Empty: VLLM_TASKS_API_URL.",
    )
    api_key: SecretStr | None = Field(
        default=None, title="Key", description="Bearer token. Empty: VLLM_TASKS_API_KEY."
    )
    model: str | None = Field(
        default=None, title="Model", description="The server's name for the model. Empty: its only one."
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        title="Timeout",
        description="Seconds for one attempt of one row. Empty: VLLM_TASKS_TIMEOUT (600).",
    )
    retries: int | None = Field(
        default=None,
        ge=0,
        title="Retries",
        description="Attempts for one row after the first. Empty: VLLM_TASKS_RETRIES (5).",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        title="Rows in flight",
        description="Per server, shared by all calls with the same settings. "
        "Empty: VLLM_TASKS_MAX_IN_FLIGHT (256).",
    )
    stream: bool = Field(
        default=False,
        title="Stream",
        description="Receive answers token by token and use them when they are complete: for gateways that "
        "close idle connections.",
    )

    @field_validator("api_url")
    @classmethod
    def _proper_urls(cls, value: str | list[str]) -> str | list[str]:
        split_urls(value)
        return value

    def _servers(self) -> tuple[tuple[str, ...], wire.Protocol]:
        """The base URLs, and the protocol that their common path selects."""
        urls, protocol = split_urls(self.api_url or site_settings().api_url)
        if not urls:
            raise InvalidCall(
                "VllmAPI has no api_url: pass api_url='http://host:8000' or set VLLM_TASKS_API_URL"
            )
        return urls, protocol

    def engine_config(self) -> HttpConfig:
        settings = site_settings()
        urls, protocol = self._servers()
        if self.stream and protocol == "legacy":
            raise InvalidCall(
                "stream=True needs OpenAI's protocol, and the URL's path is /generate: leave it out"
            )
        key = self.api_key or (settings.api_key if _has_site_key(urls, settings) else None)
        return HttpConfig(
            urls=urls,
            protocol=protocol,
            api_key=key.get_secret_value() if key else None,
            model=self.model,
            timeout=_either(self.timeout, settings.timeout),
            retries=_either(self.retries, settings.retries),
            max_in_flight=_either(self.max_in_flight, settings.max_in_flight),
            grace_period=settings.grace_period,
            max_response_bytes=settings.max_response_bytes,
            stream=self.stream,
        )

    def sampling_target(self) -> Target:
        return split_urls(self.api_url or site_settings().api_url)[1]

    def resources(self) -> Resources:
        return Resources.of(self.compute_kwargs, {})


def _has_site_key(urls: Sequence[str], settings: Settings) -> bool:
    """Whether the site's key may be sent to `urls`: it is sent only to the site's own servers."""
    of_site, _ = split_urls(settings.api_url)
    return not of_site or origins(urls) <= origins(of_site)


def _either(own: T | None, site: T) -> T:
    return site if own is None else own
