"""`python -m vllm_tasks.pools`: make the work pools, or bring them up to date."""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace

import httpx
from prefect.settings import PREFECT_API_URL

from vllm_tasks.engines.local.gpus import visible_devices
from vllm_tasks.errors import InvalidCall, ServerUnavailable, VllmTasksError
from vllm_tasks.pools import POOL_TYPES, Pool, make


def main(arguments: list[str] | None = None) -> None:
    """Make the pools that the arguments name, and print what is there then."""
    asked = parse(arguments)
    if asked.gpus is not None and asked.gpus < 0:
        raise InvalidCall(f"--gpus {asked.gpus} is less than 0; give the number of GPUs of the pool")
    gpus = len(visible_devices()) if asked.gpus is None else asked.gpus
    pools = (
        Pool(asked.pool, "process"),
        Pool(asked.gpu_pool, asked.gpu_type, gpus, asked.image),
    )
    try:
        lines = make(*pools, change_slots=asked.gpus is not None)
    except httpx.TransportError as error:
        raise ServerUnavailable(
            f"no Prefect server answers at {PREFECT_API_URL.value()} ({error}); start it, or correct "
            "PREFECT_API_URL"
        ) from error
    print(*lines, sep="\n")
    if asked.gpu_type != "process" and not asked.image:
        print(
            "note: no --image; it stays as it was, and where there is none, each model needs the hint `image`"
        )
    for pool in pools:
        print(f"next: prefect worker start --pool {pool.name}")


def parse(arguments: list[str] | None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(
        "python -m vllm_tasks.pools", description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pool", default="vllm", help="process pool for servers and models on CPUs")
    parser.add_argument("--gpu-pool", default="vllm-gpu", help="pool for models on GPUs")
    parser.add_argument("--gpu-type", default="process", choices=POOL_TYPES, help="its type")
    parser.add_argument(
        "--gpus", type=int, help="its GPUs; those of this machine when neither given nor known to Prefect"
    )
    parser.add_argument("--image", help="its image, where a model names none (docker, kubernetes)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except VllmTasksError as error:
        sys.exit(str(error))
