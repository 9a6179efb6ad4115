"""What a model needs to run, from its own words: GPUs, memory, an image, and the place for it.

`Resources.of(model)` reads `tensor_parallel_size`, `vllm_kwargs` and `compute_kwargs`, and renders them
for the three kinds of work pools and for Ray. The hints themselves are checked when a model is made.
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
"""Hints that say where a job goes, not what it gets there."""

OF_RAY = {"num_cpus", "memory", "accelerator_type", "resources"}
"""Hints that Ray honours itself, on whatever machine the job is."""

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
"""By type of work pool, the hints that mean something there."""

GPU_PRODUCT = "nvidia.com/gpu.product"
"""The node label by which NVIDIA's GPU operator tells what kind of GPU a node has."""


@dataclass(frozen=True)
class Resources:
    """What one engine of a model needs, and how many engines one job holds.

    `memory` and `shm_size` are in bytes. `replicas` is 0 where a Ray cluster elsewhere has the engines,
    so that the job itself needs none of it.
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
        """By the hints of `compute_kwargs`, and the engine arguments of `PARALLEL` for an engine of our own.

        Raises `InvalidCall` where hints are wrong or contradict the arguments.
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
        """GPUs of the whole job."""
        return self.num_gpus * self.replicas

    def job_variables(self, pool_type: str) -> dict[str, Any]:
        """Job variables for a work pool of this type, made by `make pools`; only what is set is in them.

        Raises `InvalidCall` for a hint that such a pool cannot honour.
        """
        if pool_type not in HONOURED:
            raise InvalidCall(
                f"work pools of type {pool_type!r} are not known here; known are {', '.join(HONOURED)}"
            )
        self._refuse_unhonoured(pool_type)
        rendered = {"process": self._process, "docker": self._docker, "kubernetes": self._kubernetes}
        return _set(rendered[pool_type]())

    def ray_options(self) -> dict[str, Any]:
        """Options of the Ray actor of one engine; only what is set is in them, and always `num_gpus`."""
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
        """All GPUs of the machine are visible in the container, of which the engine takes free ones.

        Docker itself would give the first N to every container.
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
        """Where no scheduler hands out devices, an engine takes as many free ones as this says."""
        taken = {"VLLM_TASKS_GPUS": str(self.num_gpus)} if self.job_gpus and not self.on_ray else {}
        return {**taken, **self.env}

    def _of_job(self, of_engine: float | None) -> Any:
        return (of_engine and of_engine * self.replicas) or None


def check_declared(pool: WorkPool, variables: Mapping[str, Any]) -> None:
    """Refuse job variables that the pool's template does not declare: Prefect drops them in silence."""
    declared = pool.base_job_template.get("variables", {}).get("properties", {})
    for name in sorted(variables.keys() - declared.keys()):
        raise InvalidCall(
            f"the work pool {pool.name!r} does not declare the job variable {name!r}, and Prefect would drop "
            f"it in silence{near(name, declared)}; make the pool with `make pools` (python -m "
            f"vllm_tasks.pools), or add it to the pool's base job template"
        )


def _parallel_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InvalidCall(f"vllm_kwargs has {name}={size!r}, which is no whole number of at least 1")
    return {name: size for name, size in sizes.items() if size > 1}


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}
