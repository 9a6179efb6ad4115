"""The thin flow that is deployed on each work pool and works there for a step elsewhere.

`make pools` deploys it. `vllm_tasks.placement` runs it, not people: its main argument is JSON.
"""

# Without `from __future__ import annotations`: the process of a deployed run cannot resolve type names.
import json
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext

from vllm_tasks import tasks
from vllm_tasks.calls.chat import of_call, of_model
from vllm_tasks.calls.classes import Classes
from vllm_tasks.calls.requests import requests_of
from vllm_tasks.calls.sampling import task_of
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.engines import loop, sharing
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import payload, storage
from vllm_tasks.placement.heartbeat import Heartbeat
from vllm_tasks.placement.target import STEP
from vllm_tasks.rows import Request

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
        call: The work, as JSON.
        model: A saved block; empty: the call has the model's fields.
        db: A saved block; empty: the call has the datalayer, if it needs one.
        source: A saved block; empty: the call has the datalayer that rows are read from, if it is not db.
        heartbeat_interval: Seconds between two heartbeats.
    """
    work = json.loads(call)
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with Heartbeat(context.flow_run.id, heartbeat_interval) as heartbeat:
        try:
            model = model or MODELS[work["kind"]](**work["model"])
            db = db or (Datalayer(**work["db"]) if work.get("db") else None)
            source = source or (Datalayer(**work["source"]) if work.get("source") else None)
            if source is not None:
                work["options"]["source"] = source
            outcome = payload.outcome_of(WORKS[work["work"]](work, model, db))
        except VllmTasksError as error:
            heartbeat.settle(payload.outcome_of_error(error, _answers_path(error, work["work"])))
            raise
        heartbeat.settle(outcome)


def _answers_path(error: VllmTasksError, work: str) -> str | None:
    """The path of the answers before `error` in the result storage; a table's answers are committed."""
    return storage.store(payload.results_as_data(error.results)) if work == "rows" and error.results else None


def rows(work: dict[str, Any], model: VllmAPI | VllmModel, _: Datalayer | None) -> str:
    """Process finished prompts and return the path of the answers in the result storage."""
    content = storage.load(work["rows"])
    prompts, parameters = content["prompts"], content["parameters"]
    sampling = parameters[0]
    config, target = model.engine_config(), model.sampling_target()
    chat = of_call(model.chat, target, sampling)
    if chat is None and any(isinstance(prompt, str) for prompt in prompts):
        chat = of_model(config)
    thinks = not isinstance(model.datatype, Classes)
    given = [
        Request(prompt, parameters[i], task_of(target), lora=parameters[i].get("lora_request") if i else None)
        for prompt, i in zip(prompts, content["of"], strict=True)
    ]
    requests = requests_of(given, chat, model.system, sampling, target, thinks=thinks)
    results = loop.run(sharing.generate(config, requests, model.max_batch_size))
    return storage.store(payload.results_as_data(results))


def table(work: dict[str, Any], model: VllmAPI | VllmModel, db: Datalayer | None) -> Any:
    """Process the rows of a table, or of one of its shards, and return the report."""
    return tasks.predict_in_db(model, work["X"], work["select"], db=db, **work["options"])


def validation(work: dict[str, Any], model: VllmAPI | VllmModel, db: Datalayer | None) -> Any:
    """Validate and return the report. The gate fails the run that called the step, not this one."""
    from vllm_tasks.validation import Validation

    chosen = work["validation"] and Validation(**work["validation"])
    return tasks.validate_without_gate(model, chosen, db=db, **work["options"])


WORKS = {"rows": rows, "table": table, "validation": validation}
