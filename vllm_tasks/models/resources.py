"""The resources that a model needs: GPUs, memory, an image, and the work pool that has them.

`Resources.of` reads the hints of `compute_kwargs`, and the engine arguments that decide the number of GPUs.
Methods render them for the three types of work pools and for Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.models.hints import HINTS, checked, quantity

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool

PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)
"""Engine arguments whose product is the number of GPUs of one engine."""

ROUTES = {"work_pool", "work_queue", "deployment"}
"""Hints that say where a job runs, not what it gets there."""

OF_RAY = {"num_cpus", "memory", "accelerator_type", "resources"}
"""Hints that Ray honours itself, whatever the type of the work pool."""

HONOURED = {
    "process": {"num_gpus", "env"},
    "docker": {"num_gpus", "num_cpus", "memory", "shm_size", "image", "env"},
    "kubernetes": {
        "num_gpus",
        "num_cpus",
        "memory",
        "accelerator_type",
        "shm_size",
        "image",
        "env",
        "node_selector",
        "tolerations",
    },
}
"""The hints that each type of work pool honours."""

GPU_PRODUCT = "nvidia.com/gpu.product"
"""The node label in which NVIDIA's GPU operator writes the model of a node's GPUs."""


@dataclass(frozen=True)
class Resources:
    """What one engine of a model needs, and how many engines one job holds.

    `memory` and `shm_size` are in bytes. `replicas` is 0 if the engines are on a remote Ray cluster: the job
    itself then needs none of this.
    """

    num_gpus: int
    replicas: int = 1
    num_cpus: float | None = None
    memory: int | None = None
    accelerator_type: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    shm_size: int | None = None
    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # its values may be secrets
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    work_pool: str | None = None
    work_queue: str | None = None
    deployment: str | None = None
    on_ray: bool = False

    @classmethod
    def of(cls, hints: Mapping[str, Any], parallel: Mapping[str, Any]) -> Resources:
        """Make the resources of a model.

        Args:
            hints: The model's `compute_kwargs`.
            parallel: The engine arguments of `PARALLEL` that are set; empty for a model on a server.

        Returns:
            The resources, with the number of GPUs that the arguments need unless the hints give one.

        Raises:
            InvalidCall: A hint is wrong, or contradicts the arguments.
        """
        hints = checked(hints)
        sizes = _parallel_sizes(parallel)
        needed = math.prod(sizes.values()) if parallel else 0
        gpus = hints.setdefault("num_gpus", needed)
        if 0 < gpus < needed:
            split = " x ".join(f"{name}={size}" for name, size in sizes.items())
            raise InvalidCall(
                f"compute_kwargs has num_gpus={gpus}, but {split} needs {needed} GPUs; leave num_gpus out, "
                "or give 0 for an engine on CPUs"
            )
        return cls(**hints)

    @property
    def job_gpus(self) -> int:
        """The number of GPUs of the job, for all its engines."""
        return self.num_gpus * self.replicas

    def job_variables(self, pool_type: str) -> dict[str, Any]:
        """Render the resources as job variables of a work pool that `make pools` has made.

        Args:
            pool_type: "process", "docker" or "kubernetes".

        Returns:
            The variables, by name; those that are not set are left out.

        Raises:
            InvalidCall: The type is unknown, or such a pool cannot honour one of the hints.
        """
        if pool_type not in HONOURED:
            raise InvalidCall(
                f"work pools of type {pool_type!r} are not supported; supported are {', '.join(HONOURED)}"
            )
        self._refuse_unhonoured(pool_type)
        rendered = {"process": self._process, "docker": self._docker, "kubernetes": self._kubernetes}
        return _set(rendered[pool_type]())

    def ray_options(self) -> dict[str, Any]:
        """Return the options of one engine's Ray actor: those that are set, and always `num_gpus`."""
        return {"num_gpus": self.num_gpus} | _set(
            {
                "num_cpus": self.num_cpus,
                "memory": self.memory,
                "accelerator_type": self.accelerator_type,
                "resources": dict(self.resources),
                "runtime_env": {"env_vars": dict(self.env)} if self.env else None,
            }
        )

    def _refuse_unhonoured(self, pool_type: str) -> None:
        by_ray = OF_RAY if self.on_ray else set()
        for hint in HINTS.keys() - ROUTES - HONOURED[pool_type] - by_ray:
            if vars(self)[hint]:
                fit = [kind for kind, hints in HONOURED.items() if hint in hints]
                way = f"use a pool of type {' or '.join(fit)}" if fit else "use on_ray=True"
                raise InvalidCall(
                    f"compute_kwargs has {hint}, which a work pool of type {pool_type!r} cannot honour; "
                    f"{way}, or leave it out"
                )

    def _process(self) -> dict[str, Any]:
        return {"env": self._env_with_gpus()}

    def _docker(self) -> dict[str, Any]:
        """Make all GPUs of the machine visible in the container; the engine then takes free ones.

        With a count, Docker would give the first N GPUs to every container.
        """
        gpus = [{"driver": "nvidia", "count": -1, "capabilities": [["gpu"]]}] if self.job_gpus else None
        nano = self._of_job(self.num_cpus)
        created = {
            "device_requests": gpus,
            "shm_size": self._of_job(self.shm_size),
            "nano_cpus": nano and math.ceil(nano * 1e9),
        }
        memory = self._of_job(self.memory)
        return {
            "image": self.image,
            "env": self._env_with_gpus(),
            "mem_limit": memory and f"{memory}b",
            "container_create_kwargs": _set(created),
        }

    def _kubernetes(self) -> dict[str, Any]:
        memory, shm_size, cpus = map(self._of_job, (self.memory, self.shm_size, self.num_cpus))
        product = {GPU_PRODUCT: self.accelerator_type} if self.accelerator_type and self.job_gpus else {}
        return {
            "image": self.image,
            "env": dict(self.env),
            "num_gpus": self.job_gpus or None,
            "num_cpus": cpus and f"{cpus:g}",
            "memory": memory and quantity(memory),
            "shm_size": shm_size and quantity(shm_size),
            "node_selector": {**product, **self.node_selector},
            "tolerations": [dict(toleration) for toleration in self.tolerations],
        }

    def _env_with_gpus(self) -> dict[str, str]:
        """The variables of `env`, and the number of free GPUs that the engine takes without a scheduler."""
        taken = {"VLLM_TASKS_GPUS": str(self.num_gpus)} if self.job_gpus and not self.on_ray else {}
        return {**taken, **self.env}

    def _of_job(self, of_engine: float | None) -> Any:
        return (of_engine and of_engine * self.replicas) or None


def check_declared(pool: WorkPool, variables: Mapping[str, Any]) -> None:
    """Raise `InvalidCall` for job variables that the pool does not declare: Prefect drops them silently."""
    declared = pool.base_job_template.get("variables", {}).get("properties", {})
    for name in sorted(variables.keys() - declared.keys()):
        raise InvalidCall(
            f"the work pool {pool.name!r} does not declare the job variable {name!r}, and Prefect would drop "
            f"it silently{near(name, declared)}; make the pool with `make pools` (python -m "
            f"vllm_tasks.pools), or add the variable to the pool's base job template"
        )


def _parallel_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InvalidCall(f"vllm_kwargs has {name}={size!r}, which is not a whole number of at least 1")
    return {name: size for name, size in sizes.items() if size > 1}


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}
