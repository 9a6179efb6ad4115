"""`VllmModel`: a model that the flow's own process runs in a vLLM engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from prefect.blocks.core import Block
from pydantic import Field, model_validator

from vllm_tasks.calls.pooling import returns_numbers
from vllm_tasks.calls.sampling import Target
from vllm_tasks.datalayer.block_fields import OF_BLOCK
from vllm_tasks.engines.local.engine import LocalConfig
from vllm_tasks.engines.ray.engine import RayConfig
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models.fields import VLLM_DOCS
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.models.resources import PARALLEL, Resources
from vllm_tasks.settings import site_settings

FOREIGN_CODE = {
    "trust_remote_code": "trust_rem",
    "tool_parser_plugin": "tool_parser_p",
    "reasoning_parser_plugin": "reasoning_parser_p",
}
"""Engine arguments that run foreign code, each with its shortest abbreviation that vLLM's server takes."""


class VllmModel(Predictor, Block):
    """A model that vLLM runs in an engine here, in a process next to the caller's."""

    _block_type_name: ClassVar[str] = "vLLM Model"
    _block_type_slug: ClassVar[str] = "vllm-model"
    _description: ClassVar[str] = "Runs a model with vLLM where the flow runs."
    _documentation_url: ClassVar[Any] = f"{VLLM_DOCS}/serving/offline_inference.html"
    _code_example: ClassVar[str] = """
        ```python
        from vllm_tasks import VllmModel

        model = VllmModel.load("BLOCK_NAME")
        with model:
            answers = model.predict_batches(["What is the capital of France?"])
        ```
        """

    _elsewhere: ClassVar[str] = "; vLLM's engine arguments go into vllm_kwargs"

    _reached_by: ClassVar[tuple[str, ...]] = (
        "model_name",
        "tensor_parallel_size",
        "vllm_kwargs",
        "engine_python",
    )

    model_config = OF_BLOCK

    model_name: str = Field(
        default="", title="Model", description="A name on Hugging Face, or a folder where the flow runs."
    )
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        title="Tensor parallel size",
        description="Number of GPUs that one copy of the model is split over.",
    )
    trust_remote_code: bool = Field(
        default=True,
        title="Trust remote code",
        description="Run code that the model brings along, unless the site forbids it.",
    )
    vllm_kwargs: dict[str, Any] = Field(
        default={},
        repr=False,  # its hf_token is a secret
        title="Engine arguments",
        description='vllm_kwargs by vLLM\'s names, such as {"max_model_len": 4096}; they override fields.',
    )
    engine_python: str | None = Field(
        default=None,
        title="Python of vLLM",
        description="Path of the Python that has vLLM, where the flow runs, such as /opt/vllm/bin/python. "
        "Empty: the site's setting, or the flow's own Python.",
    )
    on_ray: bool = Field(
        default=False, title="On Ray", description="Run engines as actors on a Ray cluster, or a local Ray."
    )
    ray_address: str | None = Field(
        default=None, title="Ray cluster", description="Its address, such as host:6379. Empty: RAY_ADDRESS."
    )
    ray_config: dict[str, Any] = Field(
        default={},
        repr=False,  # its runtime_env may hold secrets
        title="Options of the actors",
        description='By Ray\'s names, such as {"num_cpus": 4, "runtime_env": {}}; they override the hints.',
    )
    replicas: int = Field(
        default=1, ge=1, title="Replicas", description="Number of engines on Ray that share the rows."
    )

    @model_validator(mode="after")
    def _ray_by_address(self) -> Self:
        if self.ray_address:
            object.__setattr__(self, "on_ray", True)  # a plain assignment would validate again
        return self

    def engine_config(self) -> LocalConfig | RayConfig:
        arguments, settings = self._arguments(), site_settings()
        host: dict[str, Any] = {
            "start_timeout": settings.engine_start_timeout,
            "timeout": settings.engine_timeout,
            "python": self.vllm_python(),
        }
        if self.on_ray:
            options = _as_json("ray_config", self._actor_options())
            workers = self.resources().num_gpus if self._has_ray_executor() else 0
            return RayConfig(arguments, options, self.ray_address, self.replicas, worker_gpus=workers, **host)
        if self.replicas > 1:
            raise InvalidCall(
                f"replicas={self.replicas} are for Ray: set on_ray=True or ray_address; without Ray, "
                f"predict_in_db(..., shards={self.replicas}) spreads a table over flow runs"
            )
        return LocalConfig(arguments, gpus=self.resources().num_gpus, **host)

    def _arguments(self) -> str:
        """vLLM's engine arguments, as JSON."""
        if not (self.model_name or "model" in self.vllm_kwargs):
            raise InvalidCall("VllmModel has no model_name: pass a folder or a Hugging Face name")
        arguments = {
            "model": self.model_name,
            "tensor_parallel_size": self.tensor_parallel_size,
            "trust_remote_code": self.trust_remote_code,
            # Else vLLM would run a model that can also generate as a generating one.
            **({"runner": "pooling"} if returns_numbers(self.task) else {}),
            **self.vllm_kwargs,
        }
        found = None if site_settings().trust_remote_code else _foreign_code(arguments)
        if found == "trust_remote_code":
            raise InvalidCall(
                f"{self.identifier!r} has trust_remote_code=True, and this site runs no code that a model "
                "brings along (VLLM_TASKS_TRUST_REMOTE_CODE=false): pass trust_remote_code=False, and use a "
                "model that vLLM supports by itself"
            )
        if found:
            raise InvalidCall(
                f"{self.identifier!r} has {found}, a file of Python, and this site runs no such code "
                "(VLLM_TASKS_TRUST_REMOTE_CODE=false): leave it out, and name a parser that is part of vLLM"
            )
        return _as_json("vllm_kwargs", arguments)

    def _actor_options(self) -> dict[str, Any]:
        """Options of each engine's actor: the resource hints, overridden by `ray_config`."""
        options = {**self.resources().ray_options(), **self.ray_config}
        if env := self.compute_kwargs.get("env"):
            own = self.ray_config.get("runtime_env", {})
            options["runtime_env"] = {**own, "env_vars": {**env, **own.get("env_vars", {})}}
        if self.vllm_kwargs.get("data_parallel_backend") == "ray":
            raise InvalidCall(
                "on_ray: vllm_kwargs has data_parallel_backend='ray', which is not supported in an engine on "
                "Ray: use replicas=N, or run `vllm serve` with it and call that server with VllmAPI"
            )
        if self._has_ray_executor():
            if self.ray_config.get("num_gpus"):
                raise InvalidCall(
                    f"ray_config has num_gpus={self.ray_config['num_gpus']!r}, which the actor would keep "
                    "from the workers of vLLM's Ray executor (distributed_executor_backend='ray'): "
                    "leave it out"
                )
            options["num_gpus"] = 0
        return options

    def _has_ray_executor(self) -> bool:
        """Whether vLLM places its workers itself, on any machines of the cluster."""
        return self.vllm_kwargs.get("distributed_executor_backend") == "ray"

    def sampling_target(self) -> Target:
        return "local" if self.task is None or self.task == "generate" else self.task

    def vllm_python(self) -> str:
        """Return the interpreter that has vLLM; empty: this process's.

        Raises:
            InvalidCall: The site does not allow that a model names it.
        """
        settings = site_settings()
        allowed = {None, "", settings.engine_python, *settings.engine_pythons}
        is_limited = settings.engine_pythons or not settings.trust_remote_code
        if is_limited and self.engine_python not in allowed:
            raise InvalidCall(
                f"{self.identifier!r} has engine_python={self.engine_python!r}, and this site runs no "
                "program that a model names (VLLM_TASKS_ENGINE_PYTHONS, VLLM_TASKS_TRUST_REMOTE_CODE=false): "
                "leave it out, and set VLLM_TASKS_ENGINE_PYTHON where the flow runs, or have the site add it "
                "to VLLM_TASKS_ENGINE_PYTHONS (a JSON list)"
            )
        return self.engine_python or settings.engine_python

    def resources(self) -> Resources:
        hints = self.compute_kwargs
        given = {"tensor_parallel_size": self.tensor_parallel_size, **self.vllm_kwargs}
        needs = Resources.of(hints, {name: given[name] for name in PARALLEL if name in given})
        on_ray = self.on_ray or bool(self.ray_address)
        held = 0 if self.ray_address else self.replicas if on_ray else 1
        return replace(needs, replicas=held, on_ray=on_ray)


def _as_json(field: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise InvalidCall(
            f"{field} must be plain data (JSON), so that a block can hold them: {error}"
        ) from error


def _foreign_code(arguments: Mapping[str, Any]) -> str | None:
    """The first of `FOREIGN_CODE` that `arguments` has, also with dashes or abbreviated as for the server."""
    names = {name.replace("-", "_") for name, value in arguments.items() if value}
    for option, least in FOREIGN_CODE.items():
        if any(name.startswith(least) and option.startswith(name) for name in names):
            return option
    return None
