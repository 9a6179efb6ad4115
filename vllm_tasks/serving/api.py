"""`serve(model)`: vLLM's OpenAI server for a model, shared by all users on this machine that need the same.

A user *joins* a server. Under a lock, the first user starts a supervisor (see `serving.supervisor`), which
starts the server. Each user holds a shared lock while using it. The kernel releases that lock however the
user's process ends, and the supervisor ends after the last user.
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
from vllm_tasks.calls.sampling import Target, check_names
from vllm_tasks.calls.weights import engine_identity
from vllm_tasks.engines.local.engine import log_trust
from vllm_tasks.engines.local.model_files import PATHS, stamps
from vllm_tasks.engines.local.python import interpreter
from vllm_tasks.errors import EngineFailed, InvalidCall, ServerUnavailable
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.models.predictor import Predictor
from vllm_tasks.serving.shared_server import SharedServer

OWNED = (
    *("host", "port", "uds", "api_key", "root_path", "config", "headless", "api_server_count"),
    *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"),
)
"""Options of vLLM's server that decide how it is reached or run, which `serve` sets itself."""
MAY_BE_PATHS = PATHS | {"download_dir", "path"}
"""Arguments that may be paths, also within others. They are made absolute, because the server starts
in another folder."""
KEYWORDS = {"auto", "vllm"}
"""Values of `generation_config` that are not paths."""
QUIET = {"disable_log_stats": True, "disable_uvicorn_access_log": True}
"""Defaults that keep the log free of a line for each request. The model's `vllm_kwargs` override them."""


@contextmanager
def serve(model: VllmModel) -> Iterator[VllmAPI]:
    """Run vLLM's OpenAI server for `model`, and yield a `VllmAPI` for it to use in the `with` block.

        with serve(model) as served:
            predict_in_db(served, X="question", select="questions", db=db)

    The server runs in processes of its own, on a free port of this machine's loopback address, with a newly
    generated key. Any process of this user on this machine that serves the same engine arguments meanwhile
    uses the same server, which ends with its last user. If it dies it is restarted at the same URL, and rows
    in flight wait for it, for VLLM_TASKS_GRACE_PERIOD seconds. Its log is kept in `vllm_tasks/servers/` of
    the user's cache folder.

    Args:
        model: The model to serve. Its engine arguments become the server's.

    Yields:
        A `VllmAPI` with the fields of `model`, except `compute_kwargs`, and the URL and key of the server.

    Raises:
        InvalidCall: The model has a setting that a server cannot provide, such as `on_ray`.
        EngineFailed: vLLM does not start (VLLM_TASKS_ENGINE_START_TIMEOUT, seconds); the message has its
            reason. `temporary` is true if the server could not be restarted, and a call in the block
            therefore ended in `ServerUnavailable`; and if others use a server that has former contents of
            the model's files.
    """
    _check(model)
    config = model.engine_config()
    engine_args = json.loads(config.engine_args)
    arguments = server_arguments(engine_args)
    command = command_line(arguments)
    if arguments.get("trust_remote_code"):
        log_trust(arguments["model"])
    files = stamps(arguments)  # from before they are hashed or loaded
    known = ModelFacts(engine_identity(engine_args), of_files(engine_args))
    python, gpus = interpreter(model.vllm_python()), model.resources().num_gpus
    server = SharedServer(arguments["model"], python, command, config.start_timeout, gpus, files)
    with server.used():
        facts = server.facts()
        with api_of(model, known, _first(arguments["served_model_name"]), facts["url"], facts["key"]) as api:
            try:
                yield api
            except ServerUnavailable as error:
                if why := server.why_ended():
                    failed = EngineFailed(why, temporary=True)
                    failed.results, failed.repeatable = error.results, error.repeatable
                    raise failed from error
                raise
            finally:
                model.metric_values.update(api.metric_values)


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model that the server itself does not report: what decides its answers, and whether it
    has a chat template (None: the server is asked)."""

    identity: Mapping[str, Any]
    has_chat_template: bool | None


class ServedAPI(VllmAPI):
    """The client of a server that `serve` runs."""

    _block_type_name: ClassVar[str] = "vLLM served"  # Prefect needs a name for each class of blocks
    _block_type_slug: ClassVar[str] = "vllm-served"
    _known: ModelFacts = PrivateAttr()

    def __init__(self, *, known: ModelFacts, **fields: Any) -> None:
        super().__init__(**fields)
        self._known = known

    def _made_anew(self) -> VllmAPI:
        return VllmAPI(**{name: getattr(self, name) for name in VllmAPI.model_fields})

    def prepare(self, *args: Any, **kwargs: Any) -> Call:
        call = super().prepare(*args, **kwargs)
        return replace(
            call, served_arguments=self._known.identity, has_chat_template=self._known.has_chat_template
        )


def api_of(model: VllmModel, known: ModelFacts, name: str, url: str, key: str) -> VllmAPI:
    """A client with the fields of `model`, except its resources, which only the server needs."""
    shared = {field: getattr(model, field) for field in Predictor.model_fields if field != "compute_kwargs"}
    api = ServedAPI(known=known, **shared, api_url=url, api_key=SecretStr(key), model=name)
    api._block_document_id = model._block_document_id  # to which a validation saves its values
    return api


def server_arguments(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the server. Raises `InvalidCall` for engine arguments that `serve` sets itself."""
    for name in engine_args:
        # vLLM accepts abbreviations of its options too.
        if owned := [own for own in OWNED if own.startswith(name.replace("-", "_"))]:
            raise InvalidCall(
                f"vllm_kwargs has {name!r}: serve(model) itself sets {owned[0]!r}; for a server of your own "
                "use VllmAPI(api_url=...)"
            )
    named = {"served_model_name": engine_args["model"], **QUIET, **engine_args}
    return {name: _rooted(name.replace("-", "_"), value) for name, value in named.items()}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as options of vLLM's command line, sorted by name. An option that is None is left out.

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
        target = model.sampling_target()
        http: Target = "chat" if model.chat else "openai"
        check_names(model.predict_kwargs, http if target == "local" else target)
    except InvalidCall as error:
        raise InvalidCall(f"serve(model) uses HTTP, which predict_kwargs do not fit: {error}") from error


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _no_option(name: str, word: str) -> str:
    """An item of a list. One that looks like an option is refused, since it could set a forbidden option."""
    if re.match("-[^0-9.]", word):
        raise InvalidCall(f"vllm_kwargs[{name!r}] has {word!r}, which vLLM's server would take for an option")
    return word


def _first(names: Any) -> str:
    return str(names[0] if isinstance(names, list) else names)


def _rooted(name: str, value: Any) -> Any:
    """`value` with the absolute paths of files in it."""
    if isinstance(value, Mapping):  # `default_mm_loras` has a path for each kind of media
        return {
            key: _rooted(name if name == "default_mm_loras" else key, each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_rooted(name, each) for each in value]
    if not isinstance(value, str) or name not in MAY_BE_PATHS or value in KEYWORDS:
        return value
    adapter, sign, path = value.partition("=") if name == "lora_modules" else ("", "", value)
    return adapter + sign + _absolute(path)


def _absolute(value: str) -> str:
    """The absolute path of an existing file; any other text, such as a Hugging Face name, unchanged."""
    return str(Path(value).absolute()) if os.path.lexists(value) else value
