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
    """Make the pools that the arguments name, and print what exists then.

    Args:
        arguments: The command line; that of the process when None.

    Raises:
        InvalidCall: An argument is wrong, or a pool exists with another type.
        ServerUnavailable: No Prefect server could be reached, or it refused a request.
    """
    options = parse(arguments)
    if options.gpus is not None and options.gpus < 0:
        raise InvalidCall(f"--gpus {options.gpus} is less than 0; give the number of GPUs of the pool")
    gpus = len(visible_devices()) if options.gpus is None else options.gpus
    pools = (
        Pool(options.pool, "process"),
        Pool(options.gpu_pool, options.gpu_type, gpus, options.image),
    )
    try:
        lines = make(*pools, change_slots=options.gpus is not None)
    except httpx.TransportError as error:
        raise ServerUnavailable(
            f"no Prefect server answers at {PREFECT_API_URL.value()} ({error}); start it, or correct "
            "PREFECT_API_URL"
        ) from error
    except httpx.HTTPStatusError as error:
        raise ServerUnavailable(
            f"the Prefect server at {PREFECT_API_URL.value()} refused a request "
            f"({error.response.status_code} {error.response.reason_phrase}); correct "
            "PREFECT_API_URL, which ends in /api, or PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        ) from error
    print(*lines, sep="\n")
    if options.gpu_type != "process" and not options.image:
        print(
            "note: without --image, the pool keeps its own; if it has none, each model needs the hint `image`"
        )
    for pool in pools:
        print(f"next: prefect worker start --pool {pool.name}")


def parse(arguments: list[str] | None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        "python -m vllm_tasks.pools", description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pool", default="vllm", help="process pool for servers and models on CPUs")
    parser.add_argument("--gpu-pool", default="vllm-gpu", help="pool for models on GPUs")
    parser.add_argument("--gpu-type", default="process", choices=POOL_TYPES, help="type of that pool")
    parser.add_argument(
        "--gpus", type=int, help="its number of GPUs; that of this machine unless given or known to Prefect"
    )
    parser.add_argument("--image", help="its image for models that name none (docker, kubernetes)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except VllmTasksError as error:
        sys.exit(str(error))
