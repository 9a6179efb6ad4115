"""Both models as data: fields, defaults, and one clear error for each mistake."""

from __future__ import annotations

from decimal import Decimal
from json import dumps, loads
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from tests.models.making import BOTH, Maker, refusal
from vllm_tasks import Artifact, Dataset, InvalidCall, Metric, Validation, VllmAPI, VllmModel
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.engines.ray.engine import RayConfig
from vllm_tasks.settings import Settings, site_settings

# ---------------------------------------------------------------------- fields


@BOTH
def test_an_identifier_is_all_a_model_needs(make: Maker) -> None:
    """Every other field has the default of the design."""
    model = make(identifier="m")
    assert (model.signature, model.prompt, model.max_batch_size) == ("singleton", "{input}", 4)
    assert (model.chat, model.system, model.prompt_func, model.db) == (None, None, None, None)
    assert model.artifacts == model.predict_kwargs == model.metric_values == {}


@BOTH
def test_every_instance_has_a_uuid_of_its_own(make: Maker) -> None:
    """Two models of one identifier are distinct, and a copy is the same model."""
    one, other = make(identifier="m"), make(identifier="m")
    assert one.uuid != other.uuid
    assert one.model_copy().uuid == one.uuid


@BOTH
def test_a_slash_in_the_identifier_becomes_a_dash(make: Maker) -> None:
    """Names of the Hugging Face kind can name a table and a block."""
    assert make(identifier="org/model/v1").identifier == "org-model-v1"


@BOTH
def test_default_containers_are_not_shared(make: Maker) -> None:
    """A change of one model's dicts does not appear in another model."""
    make(identifier="a").predict_kwargs["temperature"] = 1
    assert make(identifier="b").predict_kwargs == {}


@BOTH
def test_every_field_has_a_description(make: Any) -> None:
    """The form in the UI explains each field by a sentence."""
    for name, field in make.model_fields.items():
        assert (field.description or "").endswith("."), name


@BOTH
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"identifier": ""}, ["identifier", "at least 1 character", "input_value=''"]),
        ({"max_batch_size": 0}, ["max_batch_size=0", "at least 1", "None"]),
        ({"max_batch_size": -4}, ["max_batch_size=-4", "at least 1", "None"]),
        ({"signature": "kwargs"}, ["'kwargs'", "'**kwargs'"]),
        ({"datatype": "string"}, ["'string'", "'str'"]),
        ({"predict_kwargs": {"temprature": 0}}, ["'temprature'", "did you mean 'temperature'"]),
        ({"predict_kwargs": {"stream": True}}, ["'stream' cannot be set", "complete answers"]),
        ({"compute_kwargs": {"num_gpu": 1}}, ["'num_gpu'", "'num_gpus'"]),
        ({"artifacts": {"a": {"uri": "x", "datatype": "yaml"}}}, ["'yaml'", "'json'"]),
        ({"artifacts": {"a": {"uri": ""}}}, ["artifacts.a.uri", "at least 1"]),
        ({"prompt": "{input.__class__}"}, ["{input.__class__}", "plain key", "prompt_func"]),
        ({"prompt": "{"}, ["'{'", "{{ and }}"]),
        ({"prompt": "{artifacts.rules}"}, ["['artifacts.rules']", "artifacts has []"]),
        ({"prompt": "{question}"}, ["['question']", "signature='singleton'", "signature='**kwargs'"]),
        ({"prompt": "{0}"}, ["['0']", "'*args' for tuples"]),
        ({"promt": "x"}, ["no field 'promt'", "did you mean 'prompt'"]),
        ({"temperature": 0}, ["'temperature' is a sampling parameter", "predict_kwargs"]),
        ({"qqqq": 0}, ["no field 'qqqq'"]),
        ({"db": {1: "x"}}, ["the name of a field is no text"]),
        ({"datatype": {1: "x"}}, ["the name of a field is no text"]),
        ({"output_schema": {"a": "integer"}}, ["{'a': 'integer'}", "str, int, float", "JSON Schema"]),
        ({"output_schema": {"a": "int", "b": [1]}}, ["{'b': [1]}", "str, int, float", "JSON Schema"]),
        ({"output_schema": {}}, ["JSON Schema"]),
        ({"output_schema": "os.environ"}, ["'os.environ' is outside"]),
        ({"output_schema": "vllm_tasks.absent.Y"}, ["No module named 'vllm_tasks.absent'"]),
        (
            {"output_schema": "vllm_tasks.calls.prompts.joined"},
            ["'vllm_tasks.calls.prompts.joined'", "not a pydantic model"],
        ),
        ({"output_schema": "vllm_tasks.calls.prompts.Template"}, ["not a pydantic model"]),
        (
            {"output_schema": {"type": "str"}, "datatype": "int"},
            ["datatype='int' and output_schema", "one of"],
        ),
        ({"output_schema": {"type": "integr"}}, ["not a valid JSON Schema at $.type", "'integr'"]),
        ({"output_schema": {"type": "string", "pattern": "("}}, ["not a valid JSON Schema at $.pattern"]),
        ({"output_schema": {"$ref": "#/$defs/A"}}, ["'#/$defs/A'", "not in it", "'#/$defs/NAME'"]),
        ({"output_schema": {"$ref": "http://x/y"}}, ["'http://x/y'", "not in it"]),
        ({"output_schema": {"const": {1}}}, ["plain data (JSON)"]),
        ({"output_schema": {"_error": "str"}}, ["'_error'", "cannot be a column", "rename it"]),
        ({"output_schema": {"a b": "str"}}, ["'a b'", "cannot be a column", "datatype='json'"]),
        ({"output_schema": {"a" * 64: "str"}}, ["at most 63 bytes"]),
        ({"output_schema": {"Ab": "str", "aB": "int"}}, ["'Ab' and 'aB'", "one column"]),
        (
            {"output_schema": {"type": "object", "properties": {"": {}}}},
            ["''", "cannot be a column", "rename it"],
        ),
    ],
)
def test_each_wrong_field_has_one_clear_error(make: Maker, fields: dict[str, Any], said: list[str]) -> None:
    """The error names the value, the limit and the way out."""
    message = refusal(make, **fields)
    assert not [words for words in said if words not in message], message


def test_engine_arguments_given_as_fields_are_shown_their_place() -> None:
    """The error says to pass vLLM's own arguments in `vllm_kwargs`."""
    assert "vllm_kwargs" in refusal(VllmModel, gpu_memory_utilization=0.9)


@pytest.mark.parametrize(
    "fields",
    [{"predict_kwargs": {"x": 1}}, {"identifier": None}, {"api_ulr": "x"}, {"timeout": -1}, {"prompt": "{"}],
)
def test_no_error_shows_the_key(fields: dict[str, Any]) -> None:
    """The api_key is never in an error of a model, nor in its repr."""
    with pytest.raises(ValidationError) as refused:
        VllmAPI(**{"identifier": "m", "api_key": "sk-secret", **fields})
    assert "sk-secret" not in str(refused.value)
    with pytest.raises(ValidationError) as missing:
        VllmAPI(api_key="sk-secret")
    assert "sk-secret" not in str(missing.value)
    assert "identifier" in str(missing.value)
    model = VllmAPI(identifier="m", api_key="sk-secret", api_url="http://x")
    assert "sk-secret" not in repr(model) + str(model) + repr(model.engine_config()) + dumps(
        model.model_dump(mode="json")
    )


def test_prompts_fit_their_signature_and_artifacts() -> None:
    """Names need dicts, numbers need tuples, artifacts need to be there."""
    VllmAPI(identifier="m", prompt="{question} {context}", signature="**kwargs")
    VllmAPI(identifier="m", prompt="{0} {name}", signature="*args,**kwargs")
    VllmAPI(identifier="m", prompt="{artifacts.a} {input}", artifacts={"a": Artifact(uri="x")})


# ---------------------------------------------------------------------- VllmAPI


@pytest.mark.parametrize(
    ("url", "bases", "protocol"),
    [
        ("http://h:8000", ("http://h:8000",), "openai"),
        ("http://h:8000/", ("http://h:8000",), "openai"),
        ("https://h/v1", ("https://h",), "openai"),
        ("http://h/v1/completions", ("http://h",), "completions"),
        ("http://h/v1/chat/completions/", ("http://h",), "chat"),
        ("http://h/generate", ("http://h",), "legacy"),
        ("https://gateway/team/a/v1", ("https://gateway/team/a",), "openai"),
        ("http://[::1]:8000", ("http://[::1]:8000",), "openai"),
        ("http://a, http://b/,", ("http://a", "http://b"), "openai"),
        (["http://a/generate", " http://b/generate "], ("http://a", "http://b"), "legacy"),
        ("http://a,http://b/v1", ("http://a", "http://b"), "openai"),
        ("", (), "openai"),
    ],
)
def test_the_path_of_a_url_picks_the_protocol(url: Any, bases: tuple[str, ...], protocol: str) -> None:
    """One server or several, by commas or as a list; the part before the path belongs to the base."""
    endpoints, found = split_urls(url)
    assert (tuple(map(str, endpoints)), found) == (bases, protocol)
    assert VllmAPI(identifier="m", api_url=url).api_url == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "needs a scheme and a host"),
        ("h", "needs a scheme and a host"),
        ("ftp://h", "needs a scheme and a host"),
        ("http://", "needs a scheme and a host"),
        ("http://:8000", "needs a scheme and a host"),
        ("http://h:port", "Port could not be cast"),
        ("http://h:99999", "Port out of range"),
        ("http://[::1", "Invalid IPv6"),
        ("http://h/v1?key=1", "query"),
        ("http://a/generate,http://b/v1", "mixes the protocols ['legacy', 'openai']"),
        (["http://a", "http://b/v1/completions"], "mixes the protocols"),
        (["http://a", "b:80"], "'b:80' needs a scheme"),
    ],
)
def test_a_wrong_url_is_refused_and_shown(url: Any, said: str) -> None:
    """The error shows the URL and its fault when the model is made."""
    message = refusal(VllmAPI, api_url=url)
    assert said in message
    assert "http://" in message


@pytest.mark.parametrize("url", ["", ",", " , ", [], [""]])
def test_a_call_without_a_server_says_where_to_name_one(url: Any) -> None:
    """A call without a URL in the model or the settings is refused."""
    with pytest.raises(InvalidCall, match=r"api_url='http.*VLLM_TASKS_API_URL"):
        VllmAPI(identifier="m", api_url=url).predict("x")


def test_settings_stand_in_for_what_a_model_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment gives URL, key and limits, and the model's own values win."""
    monkeypatch.setenv("VLLM_TASKS_API_URL", "http://site/generate")
    monkeypatch.setenv("VLLM_TASKS_API_KEY", "site-key")
    monkeypatch.setenv("VLLM_TASKS_MAX_IN_FLIGHT", "7")
    monkeypatch.setenv("VLLM_TASKS_TIMEOUT", "3")
    site = VllmAPI(identifier="m", predict_kwargs={"best_of": 2}).engine_config()
    assert (str(site.endpoints[0]), site.protocol) == ("http://site", "legacy")
    assert site.credentials.api_key == "site-key"
    assert (site.max_in_flight, site.timeout) == (7, 3)
    own = VllmAPI(
        identifier="m", api_url="http://own", api_key="own", max_in_flight=9, timeout=4
    ).engine_config()
    assert (str(own.endpoints[0]), own.protocol) == ("http://own", "openai")
    assert own.credentials.api_key == "own"
    assert (own.max_in_flight, own.timeout) == (9, 4)


def test_the_site_decides_at_each_call_what_a_model_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model made before the environment changed uses the new environment; its own values stay."""
    model = VllmAPI(identifier="m", api_url="http://x")
    own = VllmAPI(identifier="m", api_url="http://x", timeout=4, retries=0, max_in_flight=3)
    assert model.model_dump(include={"timeout", "retries"}) == {"timeout": None, "retries": None}
    assert (model.engine_config().timeout, model.engine_config().retries) == (600, 5)
    for name, value in {"TIMEOUT": "7", "RETRIES": "9", "MAX_IN_FLIGHT": "2"}.items():
        monkeypatch.setenv(f"VLLM_TASKS_{name}", value)
    config = model.engine_config()
    assert (config.timeout, config.retries, config.max_in_flight) == (7, 9, 2)
    config = own.engine_config()
    assert (config.timeout, config.retries, config.max_in_flight) == (4, 0, 3)


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", 0), ("timeout", -1), ("retries", -1), ("max_in_flight", 0)]
)
def test_limits_of_http_are_positive(field: str, value: float) -> None:
    """Zero seconds or rows are refused with the limit."""
    message = refusal(VllmAPI, **{field: value})
    assert field in message
    assert "greater than" in message


# ---------------------------------------------------------------------- VllmModel


def test_a_ray_address_sets_on_ray() -> None:
    """Naming a cluster means to run on it."""
    assert VllmModel(identifier="m", ray_address="auto").on_ray
    assert not VllmModel(identifier="m").on_ray
    assert VllmModel(identifier="m", on_ray=True).ray_address is None


def test_vllm_kwargs_win_over_the_fields() -> None:
    """The engine arguments are the fields, with `vllm_kwargs` on top; equal ones share an engine."""
    model = VllmModel(
        identifier="m", model_name="a", tensor_parallel_size=2, vllm_kwargs={"model": "b", "seed": 1}
    )
    config = model.engine_config()
    assert loads(config.engine_args) == {
        "model": "b",
        "tensor_parallel_size": 2,
        "trust_remote_code": True,
        "seed": 1,
    }
    same = VllmModel(
        identifier="n", model_name="b", tensor_parallel_size=2, vllm_kwargs={"seed": 1}, prompt="Q: {input}"
    )
    assert same.engine_config() == config


def test_a_local_model_needs_a_model() -> None:
    """Without `model_name` or `vllm_kwargs['model']` the call is refused with the argument to pass."""
    with pytest.raises(InvalidCall, match="model_name"):
        VllmModel(identifier="m").predict("x")


def test_vllm_kwargs_must_be_plain_data() -> None:
    """Values that JSON cannot hold are refused, because no block could hold them."""
    with pytest.raises(InvalidCall, match=r"vllm_kwargs must be plain data.*Decimal"):
        VllmModel(identifier="m", model_name="x", vllm_kwargs={"a": Decimal(1)}).predict("x")


@pytest.mark.parametrize("field", ["tensor_parallel_size", "replicas"])
def test_counts_are_at_least_one(field: str) -> None:
    """A size of zero GPUs is refused."""
    assert "greater than or equal to 1" in refusal(VllmModel, **{field: 0})


def test_replicas_are_for_ray() -> None:
    """Several engines on one machine are not started silently; the refusal names both ways out."""
    with pytest.raises(InvalidCall, match=r"replicas=2 are for Ray: set on_ray=True.*shards=2"):
        VllmModel(identifier="m", model_name="x", replicas=2).predict("x")


def test_actors_get_what_the_hints_say_unless_ray_config_says_else() -> None:
    """GPUs as the model is split, other hints by Ray's names, `ray_config` over both, environments merged."""
    model = VllmModel(
        identifier="m",
        model_name="x",
        on_ray=True,
        replicas=3,
        tensor_parallel_size=2,
        vllm_kwargs={"pipeline_parallel_size": 2},
        compute_kwargs={"num_cpus": 8, "accelerator_type": "A100", "env": {"A": "hint", "B": "hint"}},
        ray_config={"num_cpus": 4, "runtime_env": {"env_vars": {"A": "own"}, "working_dir": "."}},
    )
    config = model.engine_config()
    assert isinstance(config, RayConfig)
    assert (config.replicas, config.address) == (3, None)
    assert loads(config.options) == {
        "num_gpus": 4,
        "num_cpus": 4,
        "accelerator_type": "A100",
        "runtime_env": {"env_vars": {"A": "own", "B": "hint"}, "working_dir": "."},
    }
    for_one = VllmModel(identifier="m", model_name="x", ray_address="auto").engine_config()
    assert isinstance(for_one, RayConfig)
    assert loads(for_one.options) == {"num_gpus": 1}
    assert "own" not in repr(config) + repr(model)


def test_ray_config_must_be_plain_data() -> None:
    """A value that a block could not hold is refused with the name of the field."""
    with pytest.raises(InvalidCall, match=r"ray_config must be plain data.*Decimal"):
        VllmModel(identifier="m", model_name="x", on_ray=True, ray_config={"a": Decimal(1)}).predict("x")


# ---------------------------------------------------------------------- what later versions will use


@BOTH
def test_harmless_fields_of_later_versions_do_not_stand_in_the_way(make: Maker) -> None:
    """`datatype='str'`, resource hints, write options and validation change no answer."""
    model = make(
        identifier="m",
        datatype="str",
        compute_kwargs={"num_gpus": 1, "memory": "32Gi", "work_pool": "vllm-gpu"},
        model_update_kwargs={"table": "t"},
        validation=Validation(
            datasets=[Dataset(identifier="d", select="t")],
            metrics=[Metric(identifier="exact_match")],
            key=("q", "a"),
        ),
    )
    with pytest.raises(InvalidCall, match=r"api_url|model_name"):  # and not: not built yet
        model.predict("x")


def test_a_dataset_has_one_source() -> None:
    """Both `select` and `raw_data`, or neither, are refused by name."""
    for fields in ({}, {"select": "t", "raw_data": []}):
        with pytest.raises(ValidationError, match="'d' needs exactly one of select, raw_data and reference"):
            Dataset(identifier="d", **fields)


# ---------------------------------------------------------------------- settings


def test_every_setting_has_a_description_and_an_environment_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`VLLM_TASKS_<NAME>` sets each field of the settings, and counts at once."""
    values = {str: "text", int: "1024", float: "2.5", bool: "false", list[str]: '["a"]'}
    for name, field in Settings.model_fields.items():
        assert (field.description or "").endswith((".", ").")), name
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ["text"]
        raw = values.get(field.annotation, choices[0])  # type: ignore[arg-type]
        before = getattr(Settings(), name)
        monkeypatch.setenv(f"VLLM_TASKS_{name.upper()}", raw)
        assert getattr(Settings(), name) != before, name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TIMEOUT", "0", "greater than 0.*Seconds"),
        ("TIMEOUT", "abc", "valid number.*Seconds"),
        ("RETRIES", "1.5", "valid integer"),
        ("CALLABLE_PREFIXES", "flows", r"not a list in JSON.*\(a JSON list\)"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    """The next use names the variable, its value and the expected one, wherever it happens."""
    model = VllmAPI(identifier="m", api_url="http://x")
    monkeypatch.setenv(f"VLLM_TASKS_{name}", value)
    for use in (site_settings, lambda: VllmAPI(identifier="m"), lambda: model.predict("x")):
        with pytest.raises(InvalidCall, match=f"VLLM_TASKS_{name}='{value}'.*{expected}") as raised:
            use()
        assert not isinstance(raised.value, ValidationError)


# ---------------------------------------------------------------------- calls, against a server


@pytest.mark.parametrize("name", ["tool_parser_plugin", "reasoning-parser-plugin"])
def test_a_site_that_trusts_no_code_refuses_plugins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser in a file is code, even if the site trusts the model's own code."""
    monkeypatch.setenv("VLLM_TASKS_TRUST_REMOTE_CODE", "false")
    model = VllmModel(
        identifier="m", model_name="m", trust_remote_code=False, vllm_kwargs={name: "/tmp/evil.py"}
    )
    with pytest.raises(InvalidCall, match="a file of Python"):
        model.engine_config()
