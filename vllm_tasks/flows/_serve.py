"""`python -m vllm_tasks.flows.<name>`: serve one of these flows as a deployment."""

import argparse
from typing import Any

from prefect import Flow


def serve(flow: Flow[..., Any]) -> None:
    """Serve `flow` under the name that the command line gives it.

    There is no option for a schedule, because its runs would lack parameters: `prefect.yaml` has both.
    """
    arguments = argparse.ArgumentParser(description=f"Serve {flow.name} as a deployment.")
    arguments.add_argument("--name", default=flow.name, help="name of the deployment")
    flow.serve(name=arguments.parse_args().name)
