"""`serve(model)`: vLLM's OpenAI server for a model, one for all on this machine that want the same.

Who wants a server *joins* it: under a lock, the first one starts a supervisor (see `serving.supervisor`),
which starts the server. Users hold a shared lock as long as they use it. The kernel gives it back however
a user ends, and the supervisor ends with the last one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PrivateAttr, SecretStr

from vllm_tasks.calls.call import Call
from vllm_tasks.calls.chat import of_files
from vllm_tasks.calls.sampling import check_names
from vllm_tasks.calls.weights import engine_identity
from vllm_tasks.engines.local.engine import log_trust
from vllm_tasks.errors import EngineFailed, InvalidCall, ServerUnavailable
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.serving.shared_server import SharedServer

OWNED = (
    *("host", "port", "uds", "api_key", "root_path", "config", "headless", "api_server_count"),
    *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"),
)
"""Options of vLLM's server that say how it is reached or run, which is our part."""
PATHS = ("model", "tokenizer", "hf_config_path", "chat_template", "download_dir")
"""Arguments that may be paths, which must mean the same to a server that starts in another folder."""
QUIET = {"disable_log_stats": True, "disable_uvicorn_access_log": True}
"""No line in the log for each request; the model's `vllm_kwargs` win."""


@contextmanager
def serve(model: VllmModel) -> Iterator[VllmAPI]:
    """Run vLLM's OpenAI server for `model`, and give a `VllmAPI` that asks it, for all steps in the block.

        with serve(model) as served:
            predict_in_db(served, X="question", select="questions", db=db)

    The server runs in processes of its own, on a free port of this machine's loopback, with a key made for
    it. Whoever serves the same engine arguments on this machine meanwhile, in whatever process, gets the same
    server; it ends with its last user. It is started again, at the same URL, when it dies: rows in flight
    wait for it, for VLLM_TASKS_GRACE_PERIOD seconds. Its log stays in `vllm_tasks/servers/` of the user's
    cache.

    Raises `InvalidCall` for what a server cannot do for the model, `EngineFailed` with vLLM's reason when it
    does not start (VLLM_TASKS_ENGINE_START_TIMEOUT, seconds), and with `temporary` when it could not be
    started again and a call in the block therefore ended in `ServerUnavailable`.
    """
    _check(model)
    config = model.engine_config()
    engine_args = json.loads(config.engine_args)
    arguments = server_arguments(engine_args)
    command = command_line(arguments)
    if arguments.get("trust_remote_code"):
        log_trust(arguments["model"])
    behind = Behind(engine_identity(engine_args), of_files(engine_args))
    server = SharedServer(arguments["model"], command, config.start_timeout, model.resources().num_gpus)
    with server.used():
        told = server.facts()
        with api_of(model, behind, _first(arguments["served_model_name"]), told["url"], told["key"]) as api:
            try:
                yield api
            except ServerUnavailable as error:
                if why := server.gave_up():
                    failed = EngineFailed(why, temporary=True)
                    failed.results, failed.repeatable = error.results, error.repeatable
                    raise failed from error
                raise
            finally:
                model.metric_values.update(api.metric_values)


@dataclass(frozen=True)
class Behind:
    """What is known of the model behind a server of ours, which does not tell it itself: what decides its
    answers, and whether it has a chat template (None: to be asked)."""

    identity: Mapping[str, Any]
    has_chat_template: bool | None


class ServedAPI(VllmAPI):
    """The client of a server of ours."""

    _block_type_name: ClassVar[str] = "vLLM served"  # Prefect knows each class of blocks by a name of its own
    _block_type_slug: ClassVar[str] = "vllm-served"
    _behind: Behind = PrivateAttr()

    def __init__(self, *, behind: Behind, **fields: Any) -> None:
        super().__init__(**fields)
        self._behind = behind

    def prepare(self, *args: Any, **kwargs: Any) -> Call:
        call = super().prepare(*args, **kwargs)
        return replace(call, behind=self._behind.identity, has_chat_template=self._behind.has_chat_template)


def api_of(model: VllmModel, behind: Behind, name: str, url: str, key: str) -> VllmAPI:
    """The client that asks as `model` does; its resources are those of the server, not of who asks it."""
    shared = {field: getattr(model, field) for field in Predictor.model_fields if field != "compute_kwargs"}
    api = ServedAPI(behind=behind, **shared, api_url=url, api_key=SecretStr(key), model=name)
    api._block_document_id = model._block_document_id  # where the values of a validation go
    return api


def server_arguments(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments as those of a server: without what is ours, under the model's own name."""
    for name in engine_args:
        # vLLM takes abbreviations of its options, too.
        if owned := [own for own in OWNED if own.startswith(name.replace("-", "_"))]:
            raise InvalidCall(
                f"vllm_kwargs has {name!r}: serve(model) itself sets {owned[0]!r}; for a server of your own "
                "use VllmAPI(api_url=...)"
            )
    named = {"served_model_name": engine_args["model"], **QUIET, **engine_args}
    return {name: _absolute(value) if name in PATHS else value for name, value in named.items()}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as vLLM's command line has them, in the order of their names; None is left to vLLM.

    `{"a_b": True, "c": False, "d": {"e": 1}, "f": [1, 2], "g": 0.5}` ->
    `--a-b --no-c --d={"e": 1} --f 1 2 --g=0.5`
    """
    words: list[str] = []
    for name, value in sorted(arguments.items()):
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *(_no_option(name, _word(each)) for each in value)]
        elif value is not None:
            words.append(f"--{flag}={_word(value)}")
    return words


def _check(model: VllmModel) -> None:
    if not isinstance(model, VllmModel):
        raise InvalidCall(f"serve(model) takes a VllmModel, got a {type(model).__name__}")
    if model.on_ray or model.replicas > 1:
        raise InvalidCall(
            "serve(model) runs one server on this machine: leave out on_ray, ray_address and replicas, or "
            "predict with the VllmModel itself"
        )
    try:
        check_names(model.predict_kwargs, "chat" if model.chat else "openai")
    except InvalidCall as error:
        raise InvalidCall(f"serve(model) asks over HTTP, where predict_kwargs do not fit: {error}") from error


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _no_option(name: str, word: str) -> str:
    """An item of a list; one that begins as an option would be one, whatever is forbidden here."""
    if re.match("-[^0-9.]", word):
        raise InvalidCall(f"vllm_kwargs[{name!r}] has {word!r}, which vLLM's server would take for an option")
    return word


def _first(names: Any) -> str:
    return str(names[0] if isinstance(names, list) else names)


def _absolute(value: Any) -> Any:
    """The full path of what is there; anything else, such as a Hugging Face name, as it is."""
    return str(Path(value).absolute()) if isinstance(value, str) and os.path.lexists(value) else value
