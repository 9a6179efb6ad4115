"""The two models as Prefect blocks: whom to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, field_validator, model_validator

from vllm_tasks.calls.sampling import Target
from vllm_tasks.datalayer import LOGO
from vllm_tasks.engines import wire
from vllm_tasks.engines.http.engine import HttpConfig
from vllm_tasks.engines.http.urls import origins, split_urls
from vllm_tasks.engines.local.engine import LocalConfig
from vllm_tasks.engines.ray.engine import RayConfig
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models.predictor import FORBID, Predictor
from vllm_tasks.models.resources import PARALLEL, Resources
from vllm_tasks.settings import Settings, site_settings

T = TypeVar("T")
FOREIGN_CODE = {
    "trust_remote_code": "trust_rem",
    "tool_parser_plugin": "tool_parser_p",
    "reasoning_parser_plugin": "reasoning_parser_p",
}
"""Engine arguments that run code from elsewhere, and what each is cut to at least."""
VLLM_DOCS = "https://docs.vllm.ai/en/latest"


class VllmAPI(Predictor, Block):
    """A vLLM server that somebody runs; this is its client."""

    _block_type_name: ClassVar[str] = "vLLM API"
    _block_type_slug: ClassVar[str] = "vllm-api"
    _logo_url: ClassVar[Any] = LOGO
    _description: ClassVar[str] = "Prompts a model on a vLLM server."
    _documentation_url: ClassVar[Any] = f"{VLLM_DOCS}/serving/openai_compatible_server.html"
    _code_example: ClassVar[str] = """
        from vllm_tasks import VllmAPI

        model = VllmAPI.load("BLOCK_NAME")
        answers = model.predict_batches(["What is the capital of France?"])
        """

    _reached_by: ClassVar[tuple[str, ...]] = ("api_url", "model", "api_key")

    model_config = FORBID

    api_url: str | list[str] = Field(
        default="",
        title="URL of the server",
        description="Such as http://host:8000; or several, separated by commas. The path picks the protocol: "
        "/generate, /v1/completions, /v1/chat/completions; none means OpenAI's, as the prompt demands. "
        "Empty: VLLM_TASKS_API_URL.",
    )
    api_key: SecretStr | None = Field(
        default=None, title="Key", description="Bearer token. Empty: VLLM_TASKS_API_KEY."
    )
    model: str | None = Field(
        default=None, title="Model", description="By the server's name for it. Empty: its only one."
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
        description="Attempts of one row after its first. Empty: VLLM_TASKS_RETRIES (5).",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        title="Rows in flight",
        description="Per server, over all calls with the same settings. "
        "Empty: VLLM_TASKS_MAX_IN_FLIGHT (256).",
    )
    stream: bool = Field(
        default=False,
        title="Stream",
        description="Receive answers token by token and use them when they are complete: for gateways that "
        "close silent connections.",
    )

    @field_validator("api_url")
    @classmethod
    def _proper_urls(cls, value: str | list[str]) -> str | list[str]:
        split_urls(value)
        return value

    def _servers(self) -> tuple[tuple[str, ...], wire.Protocol]:
        """Base URLs, and the protocol that their common path picks."""
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
            raise InvalidCall("stream=True is for OpenAI's protocol; /generate answers whole: leave it out")
        key = self.api_key or (settings.api_key if _has_site_key(urls, settings) else None)
        return HttpConfig(
            urls=urls,
            protocol=protocol,
            api_key=key.get_secret_value() if key else None,
            model=self.model,
            timeout=_either(self.timeout, settings.timeout),
            retries=_either(self.retries, settings.retries),
            max_in_flight=_either(self.max_in_flight, settings.max_in_flight),
            patience=settings.patience,
            max_response_bytes=settings.max_response_bytes,
            stream=self.stream,
        )

    def sampling_target(self) -> Target:
        return split_urls(self.api_url or site_settings().api_url)[1]

    def resources(self) -> Resources:
        return Resources.of(self.compute_kwargs, {})


def _has_site_key(urls: Sequence[str], settings: Settings) -> bool:
    """Whether the site's key may go there: the key of the site's servers goes to no other."""
    of_site, _ = split_urls(settings.api_url)
    return not of_site or origins(urls) <= origins(of_site)


def _as_json(field: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise InvalidCall(
            f"{field} must be plain data (JSON), so that a block can hold them: {error}"
        ) from error


def _foreign_code(arguments: Mapping[str, Any]) -> str | None:
    """Which of `FOREIGN_CODE` is among engine arguments, also as a server's option and cut short."""
    names = {name.replace("-", "_") for name, value in arguments.items() if value}
    for option, least in FOREIGN_CODE.items():
        if any(name.startswith(least) and option.startswith(name) for name in names):
            return option
    return None


def _either(own: T | None, site: T) -> T:
    return site if own is None else own


class VllmModel(Predictor, Block):
    """A model that this process runs itself, in a vLLM engine of its own."""

    _block_type_name: ClassVar[str] = "vLLM Model"
    _block_type_slug: ClassVar[str] = "vllm-model"
    _logo_url: ClassVar[Any] = LOGO
    _description: ClassVar[str] = "Runs a model with vLLM where the flow runs."
    _documentation_url: ClassVar[Any] = f"{VLLM_DOCS}/serving/offline_inference.html"
    _code_example: ClassVar[str] = """
        from vllm_tasks import VllmModel

        model = VllmModel.load("BLOCK_NAME")
        with model:
            answers = model.predict_batches(["What is the capital of France?"])
        """

    _elsewhere: ClassVar[str] = "; vLLM's engine arguments go into vllm_kwargs"

    _reached_by: ClassVar[tuple[str, ...]] = ("model_name", "tensor_parallel_size", "vllm_kwargs")

    model_config = FORBID

    model_name: str = Field(
        default="", title="Model", description="Its name on Hugging Face, or a folder where the flow runs."
    )
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        title="Tensor parallel size",
        description="GPUs that one copy of the model is split over.",
    )
    trust_remote_code: bool = Field(
        default=True,
        title="Trust remote code",
        description="Run code that comes with the model, unless the site forbids it.",
    )
    vllm_kwargs: dict[str, Any] = Field(
        default={},
        repr=False,  # its hf_token is a secret
        title="Engine arguments",
        description='`vllm_kwargs` by vLLM\'s names, such as {"max_model_len": 4096}; they win over fields.',
    )
    on_ray: bool = Field(
        default=False, title="On Ray", description="Engines are actors on a Ray cluster, or a Ray of our own."
    )
    ray_address: str | None = Field(
        default=None, title="Ray cluster", description="To join, such as host:6379. Empty: RAY_ADDRESS."
    )
    ray_config: dict[str, Any] = Field(
        default={},
        repr=False,  # its runtime_env may hold secrets
        title="Options of the actors",
        description='By Ray\'s names, such as {"num_cpus": 4, "runtime_env": {}}; they win over the hints.',
    )
    replicas: int = Field(
        default=1, ge=1, title="Replicas", description="Engines on Ray that the rows are spread over."
    )

    @model_validator(mode="after")
    def _ray_by_address(self) -> Self:
        if self.ray_address:
            object.__setattr__(self, "on_ray", True)  # a plain assignment would validate again
        return self

    def engine_config(self) -> LocalConfig | RayConfig:
        arguments, settings = self._arguments(), site_settings()
        timeouts = {"start_timeout": settings.engine_start_timeout, "timeout": settings.engine_timeout}
        if self.on_ray:
            options = _as_json("ray_config", self._actor_options())
            return RayConfig(arguments, options, self.ray_address, self.replicas, **timeouts)
        if self.replicas > 1:
            raise InvalidCall(
                f"replicas={self.replicas} are for Ray: set on_ray=True or ray_address; without Ray, "
                f"predict_in_db(..., shards={self.replicas}) spreads a table over flow runs"
            )
        return LocalConfig(arguments, gpus=self.resources().num_gpus, **timeouts)

    def _arguments(self) -> str:
        """vLLM's engine arguments, as JSON."""
        if not (self.model_name or "model" in self.vllm_kwargs):
            raise InvalidCall("VllmModel has no model_name: pass a folder or a Hugging Face name")
        arguments = {
            "model": self.model_name,
            "tensor_parallel_size": self.tensor_parallel_size,
            "trust_remote_code": self.trust_remote_code,
            **self.vllm_kwargs,
        }
        found = None if site_settings().trust_remote_code else _foreign_code(arguments)
        if found == "trust_remote_code":
            raise InvalidCall(
                f"{self.identifier!r} has trust_remote_code=True, and this site runs no code that comes with "
                "a model (VLLM_TASKS_TRUST_REMOTE_CODE=false): pass trust_remote_code=False, with a model "
                "that vLLM knows by itself"
            )
        if found:
            raise InvalidCall(
                f"{self.identifier!r} has {found}, a file of Python, and this site runs no such code "
                "(VLLM_TASKS_TRUST_REMOTE_CODE=false): leave it out, and name a parser that vLLM has itself"
            )
        return _as_json("vllm_kwargs", arguments)

    def _actor_options(self) -> dict[str, Any]:
        """Options of each engine's actor: the resource hints, and `ray_config` over them."""
        options = {**self.resources().ray_options(), **self.ray_config}
        if env := self.compute_kwargs.get("env"):
            own = self.ray_config.get("runtime_env", {})
            options["runtime_env"] = {**own, "env_vars": {**env, **own.get("env_vars", {})}}
        return options

    def sampling_target(self) -> Target:
        return "local"

    def resources(self) -> Resources:
        hints = self.compute_kwargs
        given = {"tensor_parallel_size": self.tensor_parallel_size, **self.vllm_kwargs}
        needs = Resources.of(hints, {name: given[name] for name in PARALLEL if name in given})
        on_ray = self.on_ray or bool(self.ray_address)
        held = 0 if self.ray_address else self.replicas if on_ray else 1
        return replace(needs, replicas=held, on_ray=on_ray)
