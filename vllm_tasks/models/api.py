"""`VllmAPI`: the client of a running vLLM server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import Field, SecretStr, ValidationInfo, field_validator

from vllm_tasks.calls.sampling import Target
from vllm_tasks.datalayer.block_fields import OF_BLOCK, not_masked
from vllm_tasks.engines import loop, wire
from vllm_tasks.engines.http.connections import NAME
from vllm_tasks.engines.http.control import Control
from vllm_tasks.engines.http.credentials import AUTHORIZATION, Credentials
from vllm_tasks.engines.http.proxies import proxy_of
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.engines.http.urls import Endpoint, origins, split_urls
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models.fields import VLLM_DOCS
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.models.resources import Resources
from vllm_tasks.settings import Settings, site_settings

T = TypeVar("T")

OWN_HEADERS = {NAME.lower(), "connection", "content-length", "content-type", "transfer-encoding"}
"""Headers that describe our own requests, so that nobody else can set them."""


class VllmAPI(Predictor, Block):
    """The client of one or more running vLLM servers."""

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

    _reached_by: ClassVar[tuple[str, ...]] = ("api_url", "model", "api_key", "basic_auth", "headers")

    model_config = OF_BLOCK

    api_url: str | list[str] = Field(
        default="",
        title="URL of the server",
        description="Such as http://host:8000; separate several by commas. The path selects the protocol: "
        "/generate, /completions or /chat/completions; without one of these, the prompt decides which of "
        "OpenAI's two is used. Empty: VLLM_TASKS_API_URL.",
    )
    api_key: SecretStr | None = Field(
        default=None, title="Key", description="Bearer token. Empty: VLLM_TASKS_API_KEY."
    )
    basic_auth: SecretStr | None = Field(
        default=None,
        title="User and password",
        description="basic_auth: user:password for HTTP basic authentication, in place of a key.",
    )
    headers: SecretDict | None = Field(
        default=None,
        title="Headers",
        description='Further headers of each request, such as {"X-Api-Key": "..."}; all of them are secret.',
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

    @field_validator("api_key", "basic_auth", "headers", mode="before")
    @classmethod
    def _no_masks(cls, value: Any, info: ValidationInfo) -> Any:
        for text in value.values() if isinstance(value, Mapping) else [value]:
            text = text.get_secret_value() if isinstance(text, SecretStr) else text
            not_masked(str(info.field_name), text)
        return value

    @field_validator("api_url")
    @classmethod
    def _proper_urls(cls, value: str | list[str]) -> str | list[str]:
        split_urls(value)
        return value

    @field_validator("basic_auth")
    @classmethod
    def _proper_user(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value and not re.fullmatch(r"[^:\x00-\x1f]+:[^\x00-\x1f]*", value.get_secret_value()):
            raise ValueError("basic_auth is not of the form 'user:password', or has a line end")
        if value and info.data.get("api_key"):
            raise ValueError(f"api_key and basic_auth both set the header {AUTHORIZATION}: give one of them")
        return value

    @field_validator("headers")
    @classmethod
    def _proper_headers(cls, value: SecretDict | None, info: ValidationInfo) -> SecretDict | None:
        if value is None or not value.get_secret_value():
            return None
        for name, text in value.get_secret_value().items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|\x7e0-9A-Za-z-]+", name) or name.lower() in OWN_HEADERS:
                raise ValueError(
                    f"{name!r} is not the name of an HTTP header, or is one that vllm_tasks itself sets"
                )
            if not isinstance(text, str) or not re.fullmatch(r"[!-\x7e]([ -\x7e]*[!-\x7e])?", text):
                raise ValueError(
                    f"the value of the header {name!r} is not a text of printable ASCII characters, or has "
                    "spaces or line ends around it; one read from a file needs .strip()"
                )
            other = next((field for field in ("api_key", "basic_auth") if info.data.get(field)), None)
            if other and name.lower() == AUTHORIZATION.lower():
                raise ValueError(f"{other} and headers both set the header {AUTHORIZATION}: give one of them")
        return value

    def _more_headers(self) -> Mapping[str, str]:
        return self.headers.get_secret_value() if self.headers else {}

    def _own_authorization(self) -> bool:
        return AUTHORIZATION.lower() in {name.lower() for name in self._more_headers()}

    def _servers(self) -> tuple[tuple[Endpoint, ...], wire.Protocol]:
        """The servers' endpoints, and the protocol that their common path selects."""
        endpoints, protocol = split_urls(self.api_url or site_settings().api_url)
        if not endpoints:
            raise InvalidCall(
                "VllmAPI has no api_url: pass api_url='http://host:8000' or set VLLM_TASKS_API_URL"
            )
        return tuple(replace(e, proxy=proxy_of(e.server)) for e in endpoints), protocol

    def engine_config(self) -> HttpConfig:
        settings = site_settings()
        endpoints, protocol = self._servers()
        if self.stream and protocol == "legacy":
            raise InvalidCall(
                "stream=True needs OpenAI's protocol, and the URL's path is /generate: leave it out"
            )
        return HttpConfig(
            endpoints=endpoints,
            protocol=protocol,
            credentials=self._credentials(endpoints, settings),
            model=self.model,
            timeout=_either(self.timeout, settings.timeout),
            retries=_either(self.retries, settings.retries),
            max_in_flight=_either(self.max_in_flight, settings.max_in_flight),
            grace_period=settings.grace_period,
            max_response_bytes=settings.max_response_bytes,
            stream=self.stream,
        )

    def _credentials(self, endpoints: Sequence[Endpoint], settings: Settings) -> Credentials:
        key = self.api_key
        if not (key or self.basic_auth or self._own_authorization()) and _has_site_key(endpoints, settings):
            key = settings.api_key
        return Credentials(
            api_key=key.get_secret_value() if key else None,
            basic_auth=self.basic_auth.get_secret_value() if self.basic_auth else None,
            more=tuple(self._more_headers().items()),
        )

    def _server_version(self) -> str | None:
        if not (self.api_url or site_settings().api_url):
            return None
        config = self.engine_config()
        control = Control(config.credentials)
        return loop.run(control.vllm_version(config.endpoints[0]), raise_if_stopped)

    def sampling_target(self) -> Target:
        protocol = split_urls(self.api_url or site_settings().api_url)[1]
        if self.task is None or self.task == "generate":
            return protocol
        if protocol != "openai":
            raise InvalidCall(
                f"the path of api_url selects {protocol!r}, which generates text, and task={self.task!r} has "
                "a path of its own: use the server's base URL"
            )
        return self.task

    def resources(self) -> Resources:
        return Resources.of(self.compute_kwargs, {})


def _has_site_key(endpoints: Sequence[Endpoint], settings: Settings) -> bool:
    """Whether the site's key may be sent to `endpoints`: it is sent only to the site's own servers."""
    of_site, _ = split_urls(settings.api_url)
    return not of_site or origins(endpoints) <= origins(of_site)


def _either(own: T | None, site: T) -> T:
    return site if own is None else own
