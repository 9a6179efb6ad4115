"""`python -m vllm_tasks.flows.<name>`: serve one of these flows as a deployment."""

import argparse
from typing import Any

from prefect import Flow


def serve(flow: Flow[..., Any], cron: str) -> None:
    """Serve `flow` with the options of the command line.

    Args:
        flow: The flow.
        cron: A schedule, as an example in the help text.
    """
    arguments = argparse.ArgumentParser(description=f"Serve {flow.name} as a deployment.")
    arguments.add_argument("--name", default=flow.name, help="name of the deployment")
    arguments.add_argument("--cron", help=f"schedule, such as '{cron}'")
    given = arguments.parse_args()
    flow.serve(name=given.name, cron=given.cron)
