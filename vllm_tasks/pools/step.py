"""The thin flow that is deployed on each work pool, and does there what a step elsewhere asks for.

`make pools` deploys it. It is made for `vllm_tasks.placement`, not for people: its one argument is JSON.
"""

# Without `from __future__ import annotations`: the process of a deployed run cannot resolve texts for types.
import json
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext

from vllm_tasks import tasks
from vllm_tasks.calls.call import requests_of
from vllm_tasks.calls.chat import of_call, of_model
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.engines import loop, sharing
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import payload, storage
from vllm_tasks.placement.heartbeat import Heartbeat
from vllm_tasks.placement.target import STEP

MODELS = {"VllmAPI": VllmAPI, "VllmModel": VllmModel}


@flow(name=STEP, persist_result=False)
def step(
    call: str,
    model: VllmAPI | VllmModel | None = None,
    db: Datalayer | None = None,
    source: Datalayer | None = None,
    heartbeat_interval: float = 15.0,
) -> None:
    """Do a part of a step that was called in another flow run.

    Args:
        call: What to do, as JSON.
        model: A saved block; empty: in the call.
        db: A saved block; empty: in the call, if it needs one.
        source: Likewise, where rows are read elsewhere than in `db`.
        heartbeat_interval: Seconds between two heartbeats.
    """
    told = json.loads(call)
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with Heartbeat(context.flow_run.id, heartbeat_interval) as heartbeat:
        try:
            model = model or MODELS[told["kind"]](**told["model"])
            db = db or (Datalayer(**told["db"]) if told.get("db") else None)
            source = source or (Datalayer(**told["source"]) if told.get("source") else None)
            if source is not None:
                told["options"]["source"] = source
            outcome = payload.outcome_of(WORKS[told["work"]](told, model, db))
        except VllmTasksError as error:
            heartbeat.settle(payload.outcome_of_error(error, _answered(error, told["work"])))
            raise
        heartbeat.settle(outcome)


def _answered(error: VllmTasksError, work: str) -> str | None:
    """The place of the answers before `error`; those of a table are committed."""
    return storage.store(payload.results_as_data(error.results)) if work == "rows" and error.results else None


def rows(told: dict[str, Any], model: VllmAPI | VllmModel, _: Datalayer | None) -> str:
    """Answer finished prompts; gives the place of the answers in the result storage."""
    content = storage.load(told["rows"])
    prompts, sampling = content["prompts"], content["sampling"]
    config, target = model.engine_config(), model.sampling_target()
    chat = of_call(model.chat, target, sampling)
    if chat is None and any(isinstance(prompt, str) for prompt in prompts):
        chat = of_model(config)
    requests = requests_of(prompts, chat, model.system, sampling, target)
    results = loop.run(sharing.answer(config, requests, model.max_batch_size))
    return storage.store(payload.results_as_data(results))


def table(told: dict[str, Any], model: VllmAPI | VllmModel, db: Datalayer | None) -> Any:
    """Rows of a table, or of one of its shards."""
    return tasks.predict_in_db(model, told["X"], told["select"], db=db, **told["options"])


def validation(told: dict[str, Any], model: VllmAPI | VllmModel, db: Datalayer | None) -> Any:
    """A validation. Its verdict is no failure of this run: it is told where the validation was called."""
    from vllm_tasks.validation import Validation

    chosen = told["validation"] and Validation(**told["validation"])
    return tasks.found(model, chosen, db=db, **told["options"])


WORKS = {"rows": rows, "table": table, "validation": validation}
