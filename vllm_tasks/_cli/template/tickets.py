"""A flow of your own: the topic of each ticket, in one word.

python tickets.py                                   # once, here; needs a vLLM server
prefect deployment run tickets/mine                 # on a worker, after `prefect deploy`
"""

# Without `from __future__ import annotations`: the process of a deployed run cannot resolve type names.
from prefect import flow

from vllm_tasks import VllmAPI, predict_in_db


@flow(name="tickets", log_prints=True)
def tickets(api_url: str = "http://127.0.0.1:8000", db: str = "data") -> int:
    """Find the topic of each ticket that has none yet.

    Args:
        api_url: The vLLM server.
        db: Where the table `tickets` is, and where the topics go: a folder, or the URL of a database.

    Returns:
        The number of tickets that got a topic.
    """
    model = VllmAPI(
        identifier="topics",
        api_url=api_url,
        prompt="Name the topic of this ticket in one word.\n{input}",
        predict_kwargs={"temperature": 0, "max_tokens": 10},
    )
    report = predict_in_db(model, "text", "tickets", db=db)
    print(report)
    return report.succeeded


if __name__ == "__main__":
    tickets()
