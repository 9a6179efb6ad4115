"""Site settings: environment variables `VLLM_TASKS_<NAME>`, or files that have settings of Prefect, too."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Hashable
from typing import Annotated, Any, Literal

from prefect.settings import get_current_settings
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from prefect.settings.sources import (
    PrefectTomlConfigSettingsSource,
    ProfileSettingsTomlLoader,
    PyprojectTomlConfigSettingsSource,
)
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsError,
)

from vllm_tasks.errors import InvalidCall

PREFIX = "VLLM_TASKS_"
TABLE = ("integrations", "vllm_tasks")
"""The table of prefect.toml that has our settings, like those of Prefect's own integrations."""
SOURCES: dict[type[PydanticBaseSettingsSource], str] = {
    EnvSettingsSource: "the environment",
    DotEnvSettingsSource: ".env",
    PrefectTomlConfigSettingsSource: f"[{'.'.join(TABLE)}] of prefect.toml",
    PyprojectTomlConfigSettingsSource: f"[tool.prefect.{'.'.join(TABLE)}] of pyproject.toml",
    ProfileSettingsTomlLoader: "the active profile of Prefect",
}
"""Where a value may stand; the first one that has it counts. The order is Prefect's own."""


def _of_json(value: Any) -> Any:
    """The list that a variable has as JSON; in a TOML file it is a list already."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"it is not a list in JSON ({error})") from error


Texts = Annotated[list[str], NoDecode, BeforeValidator(_of_json)]


class Settings(PrefectBaseSettings):
    """Site settings. A model's own parameter takes precedence over its setting."""

    model_config = build_settings_config(TABLE) | {"env_prefix": PREFIX}

    api_url: str = Field(
        default="",
        description="Server of a `VllmAPI` that names none; separate several by commas.",
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key of a `VllmAPI` that has none, sent as a bearer token."
    )
    max_in_flight: int = Field(
        default=256,
        ge=1,
        description="Rows in flight per server over HTTP, over all calls with the same settings.",
    )
    timeout: float = Field(default=600.0, gt=0, description="Seconds for one HTTP attempt of one row.")
    retries: int = Field(
        default=5,
        ge=0,
        description="HTTP attempts of one row after its first; refusals by a full server do not count.",
    )
    grace_period: float = Field(
        default=120.0,
        ge=0,
        description="Seconds to wait for a server that cannot be reached, or that refuses all rows as too "
        "many, before the call fails.",
    )
    max_response_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="Largest HTTP response read for one row, in bytes."
    )
    max_prompt_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="Largest prompt of one row that is sent, in bytes of UTF-8."
    )
    max_media_bytes: int = Field(
        default=20 * 2**20,
        ge=1,
        description="Largest pictures, audio and video of one row together, in bytes; base64 makes a third "
        "more of them.",
    )
    max_media_per_row: int = Field(default=16, ge=1, description="Most pictures, audio and video of one row.")
    max_picture_pixels: int = Field(
        default=2**30 // 4 // 3,
        ge=1,
        description="Most pixels of one picture, of which an engine needs about 16 bytes each, however small "
        "the file is. The default is that from which Pillow warns.",
    )
    engine_start_timeout: float = Field(
        default=1800.0, gt=0, description="Seconds that a local engine may take to load its model."
    )
    engine_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds without a token or a completion for any of its rows, after which a local engine "
        "is restarted.",
    )
    engine_python: str = Field(
        default="",
        description="Path of the Python that has vLLM, for a local engine or shared server whose model names "
        "none; empty: the flow's own Python.",
    )
    engine_pythons: Texts = Field(
        default=[],
        description="Paths of the Pythons that a model may name as its engine_python (a JSON list), besides "
        "the site's own; empty: any, unless trust_remote_code is false.",
    )
    commit_rows: int = Field(
        default=512, ge=1, description="Rows per commit group of `predict_in_db`, unless the call sets it."
    )
    commit_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds after which finished rows are committed, however few; sooner in a young run.",
    )
    select_memory: str = Field(
        default="25%",
        description="Memory that a SELECT over the files of a lake may take, as DuckDB writes it: 4GB, or a "
        "percentage of the machine's; the rest is spilled to the temporary folder.",
    )
    price_per_hour: float = Field(
        default=0.0,
        ge=0,
        description="Price of an hour of a run, with all its GPUs, for `estimate` and `max_cost`.",
    )
    price_per_million_prompt_tokens: float = Field(
        default=0.0, ge=0, description="Price of a million prompt tokens, for `estimate` and `max_cost`."
    )
    price_per_million_completion_tokens: float = Field(
        default=0.0,
        ge=0,
        description="Price of a million tokens of answers, for `estimate` and `max_cost`.",
    )
    gpu_work_pool: str = Field(
        default="",
        description="Work pool for steps with a local model that names none; empty: they run in the flow's "
        "own process.",
    )
    heartbeat_timeout: float = Field(
        default=90.0,
        gt=0,
        description="Heartbeat timeout: seconds without a heartbeat after which a flow run that a step "
        "created counts as dead.",
    )
    gpu_slots: str = Field(
        default="",
        description="Prefect's global concurrency limit in which a local engine holds a slot for each of its "
        "GPUs; `make pools` sets it for its pools.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        description="GPUs of the machine that a local engine reserves, at least as many as it is split over; "
        "0: vLLM takes the first ones, whoever else uses them.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO",
        description="Lines of the package that are logged, read when it is imported: INFO has progress and "
        "what is waited for, WARNING only what a person should look at.",
    )
    report_samples: int = Field(
        default=3,
        ge=0,
        description="Answers that the report of a run over a table shows, with their keys; 0: none.",
    )
    trust_remote_code: bool = Field(
        default=True,
        description="Whether engines may run code of a model's own; false refuses models that would run it.",
    )
    places: Texts = Field(
        default=[],
        description="Folders, and beginnings of URIs, that artifacts, prompt files, pictures, audio, video, "
        "lakes, files of SQLite and DuckDB, and batch files may be in (a JSON list); empty: anywhere.",
    )
    callable_prefixes: Texts = Field(
        default=["flows"],
        description="Modules that dotted paths to callables may come from (a JSON list).",
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read `SOURCES`, in their order."""
        return init_settings, *(source(settings_cls) for source in SOURCES)


def site_settings() -> Settings:
    """Return the settings; a changed environment or file takes effect at once.

    Raises `InvalidCall`, which names the setting, where it stands, its value and the expected one.
    """
    try:
        return _read(_state())
    except SettingsError as error:  # of Prefect: a file that is not TOML
        raise InvalidCall(str(error)) from error
    except ValidationError as error:
        wrong = [_in_words(str(e["loc"][0]), e["input"], e["msg"]) for e in error.errors()]
        raise InvalidCall("; ".join(wrong)) from error


_reading = threading.Lock()
"""Prefect's cache of files, by which settings are read, is not made for several threads at once."""


def _reset_in_child() -> None:
    global _reading  # another thread of the parent may have held it at the fork
    _reading = threading.Lock()


os.register_at_fork(after_in_child=_reset_in_child)


@functools.lru_cache(maxsize=8)
def _read(_state: Hashable) -> Settings:
    with _reading:
        return Settings()  # which takes milliseconds


def _state() -> Hashable:
    """A key of what the settings are read from: they are read again when it changes."""
    profiles = os.environ.get("PREFECT_PROFILES_PATH") or get_current_settings().profiles_path
    files = ".env", "prefect.toml", "pyproject.toml", profiles
    variables = (item for item in os.environ.items() if item[0].upper().startswith((PREFIX, "PREFECT_")))
    return tuple(map(_stamp, files)), frozenset(variables)


def _stamp(path: str | os.PathLike[str] | None) -> tuple[int, ...] | None:
    try:
        found = os.stat(path or "")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _in_words(name: str, value: object, why: str) -> str:
    place = next(place for source, place in SOURCES.items() if name in source(Settings)())
    named = name if place.startswith("[") else f"{PREFIX}{name.upper()}"
    shown = "***" if name == "api_key" else repr(str(value)[:100])
    meaning = Settings.model_fields[name].description
    return f"{named}={shown} in {place}: {why}; it means: {meaning}"
