"""Fingerprints of data and models: equal for the same work on any machine, different for different work."""

from __future__ import annotations

import ast
import json
import os
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from psycopg.types.range import Range

from vllm_tasks import VllmModel
from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.chat import of_files
from vllm_tasks.calls.weights import IGNORED, engine_identity, sampling_identity
from vllm_tasks.canonical import fingerprint, input_hash
from vllm_tasks.datalayer.values import Number
from vllm_tasks.serving.api import ModelFacts, api_of

# ---------------------------------------------------------------------- data


def test_numbers_that_a_form_cannot_tell_apart_are_the_same() -> None:
    """A browser makes 0 of 0.0; True is not 1."""
    assert fingerprint({"temperature": 0.0}) == fingerprint({"temperature": 0})
    assert fingerprint({"temperature": 0.5}) != fingerprint({"temperature": 0})
    assert fingerprint({"x": True}) != fingerprint({"x": 1})


def test_the_order_of_a_schema_counts_and_that_of_parameters_does_not() -> None:
    """Properties count in their order, in which they are answered; the order of parameters does not count."""

    def schema(*names: str) -> str:
        decoder = Decoder.of(None, dict.fromkeys(names, "str"), False, False)
        return fingerprint({"outputs": decoder.identity()})

    assert schema("a", "b") != schema("b", "a")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_the_order_within_a_parameter_counts() -> None:
    """vLLM answers the properties of a schema in their order, and a template prints a tool as it is given."""

    def sampled(**sampling: Any) -> str:
        return fingerprint(sampling_identity(sampling))

    def schema(*names: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string"} for name in names}}

    one, other = schema("reason", "label"), schema("label", "reason")
    assert sampled(structured_outputs={"json": one}) != sampled(structured_outputs={"json": other})
    assert sampled(tools=[{"function": one}]) != sampled(tools=[{"function": other}])
    assert sampled(logit_bias={"1": 2, "3": 4}) == sampled(logit_bias={"3": 4, "1": 2})
    assert sampled(max_tokens=1, seed=2) == sampled(seed=2, max_tokens=1)
    assert sampled(structured_outputs={"x": 0.0}) == sampled(structured_outputs={"x": 0})


@pytest.mark.parametrize(
    "value",
    [
        b"\x00\xff",
        date(2026, 1, 2),
        {date(2026, 1, 2): 1},
        [None, {"a": (1, 2)}],
        {1, 2},
        float("nan"),
        2**70,
    ],
)
def test_any_value_of_a_table_can_be_hashed(value: Any) -> None:
    """Values of all types have a hash, equal for equal ones and another than their text's."""
    assert input_hash([value]) == input_hash([value])
    assert input_hash([value]) != input_hash([str(value)])


@dataclass(frozen=True, slots=True)
class Slotted:
    """A value without a `__dict__`, whose copy is made from its class and its state."""

    amount: int


def test_values_with_slots_count_by_their_fields() -> None:
    """Their class counts by its name, not by all that hangs on it, which has no end."""
    for one, other in ((Slotted(1), Slotted(2)), (Range(1, 5), Range(1, 6))):
        assert input_hash([one]) != input_hash([other])
        assert input_hash([one]) == input_hash([deepcopy(one)])


def test_numbers_are_told_apart_by_their_text() -> None:
    """What a prompt would show differently is another input; the same number of another type is not."""
    for one, other in ((1, 1.0), (0.0, -0.0), (12.5, Number("12.50")), (100000.0, Number("1e5")), (1, True)):
        assert input_hash([one]) != input_hash([other])
        assert input_hash([{"a": [one]}]) != input_hash([{"a": [other]}])
    assert input_hash([12.5]) == input_hash([np.float64(12.5)]) == input_hash([Number("12.5")])


def test_deep_values_have_an_end() -> None:
    """A value nested in itself is no endless loop."""
    deep: list[Any] = []
    deep.append(deep)
    assert input_hash([deep])


# ---------------------------------------------------------------------- models


def test_a_local_model_counts_by_the_contents_of_its_files(tmp_path: Path) -> None:
    """The location and the times of files and arguments that change only the speed do not count."""

    def folder(name: str, weights: bytes, template: str = "t") -> str:
        (tmp_path / name / "templates").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "templates" / "tools.jinja").write_text(template)
        (tmp_path / name / "README.md").write_text(name)
        os.utime(tmp_path / name / "model.safetensors", (1, 1))
        return str(tmp_path / name)

    def identity(name: str, weights: bytes = b"a", template: str = "t", **more: Any) -> Any:
        return engine_identity({"model": folder(name, weights, template), **more})

    here = identity("here")
    assert here == identity("there", tensor_parallel_size=2)
    assert here != identity("weights", b"b")
    assert here != identity("template", template="u")
    assert here != identity("type", dtype="float32")
    (tmp_path / "here" / "model.safetensors").write_bytes(b"b")
    os.utime(tmp_path / "here" / "model.safetensors", (1, 1))
    assert here != engine_identity({"model": str(tmp_path / "here")})


def test_other_files_of_the_arguments_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file, a folder with a generation_config, a template and nested configurations count."""
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "model.gguf", tmp_path / "settings"
    folder.mkdir()
    given = {
        "model": "model.gguf",
        "generation-config": "settings",
        "chat_template": str(file),
        "speculative_config": {"model": "./settings"},
    }
    for name, value in given.items():
        file.write_text("a")
        (folder / "generation_config.json").write_text("a")
        before = engine_identity({name: value})
        file.write_text("b")
        (folder / "generation_config.json").write_text("b")
        assert engine_identity({name: value}) != before
    assert engine_identity({"quantization": "settings"}) == {"quantization": "settings"}
    assert engine_identity({"chat_template": "/{{x}}" * 5_000})


@pytest.mark.parametrize("place", [0, 2**19, 30 * 2**20, 60 * 2**20, 2**26])
def test_large_files_count_by_their_head_and_by_samples(tmp_path: Path, place: int) -> None:
    """Another tensor of a few hundred kB is seen wherever it is."""
    file = tmp_path / "model.safetensors"
    file.touch()
    os.truncate(file, 2**26 + 2**20)
    before = engine_identity({"model": str(tmp_path)})
    with file.open("r+b") as content:
        content.seek(place)
        content.write(b"b" * 2**19)
    assert engine_identity({"model": str(tmp_path)}) != before


SERVER = "entrypoints/launchers/cli_args.py"


def fields_of(tree: ast.Module, *classes: str) -> set[str]:
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in classes]
    return {ast.unparse(a.target) for c in found for a in c.body if isinstance(a, ast.AnnAssign)}


def left_out(tree: ast.Module, kind: str) -> set[str]:
    """The fields that `compute_hash` of a vLLM configuration leaves out."""
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind]
    sets = [n.value for n in ast.walk(found) if isinstance(n, ast.Assign) and "ignored" in ast.unparse(n)]
    return set(ast.literal_eval(sets[0]))


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM's source")
def test_arguments_that_do_not_count_are_vllms() -> None:
    """Each entry is an engine argument, and everything that vLLM's own hash leaves out is among them."""
    (place,) = find_spec("vllm").submodule_search_locations or ()  # type: ignore[union-attr]
    trees = {
        name: ast.parse(Path(place, name).read_text())
        for name in ("engine/arg_utils.py", SERVER, "config/parallel.py", "config/cache.py")
    }
    known = fields_of(trees["engine/arg_utils.py"], "EngineArgs", "AsyncEngineArgs")
    of_server = fields_of(trees[SERVER], "BaseFrontendArgs", "FrontendArgs")
    assert IGNORED - known - of_server == {"swap_space", "disable_log_requests"}, "of older versions"
    out = left_out(trees["config/parallel.py"], "ParallelConfig") | left_out(
        trees["config/cache.py"], "CacheConfig"
    )
    code_of_ones_own = {"worker_cls", "worker_extension_cls"}
    skips_work = {"kv_sharing_fast_prefill", "swa_bounded_replay", "enable_mamba_shared_prefix_checkpoint"}
    launch = {"_api_process_count", "_api_process_rank"}
    assert (out & known) - IGNORED == code_of_ones_own | skips_work | launch


def test_a_token_for_downloads_does_not_count_and_an_adapter_counts_by_its_files(tmp_path: Path) -> None:
    """A token and the location of an adapter's folder do not decide an answer."""
    assert engine_identity({"model": "m", "hf_token": "a"}) == engine_identity({"model": "m"})
    asked = []
    for number, (folder, content) in enumerate((("here", "a"), ("there", "a"), ("again", "b"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter.bin").write_text(content)
        lora = {"lora_name": "l", "lora_int_id": number, "lora_path": str(tmp_path / folder)}
        asked.append(sampling_identity({"temperature": 0, "lora_request": lora}))
    assert asked[0] == asked[1] != asked[2]
    assert sampling_identity({"temperature": 0}) == {"temperature": 0}


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_a_served_model_is_the_model(tmp_path: Path, template: str | None) -> None:
    """A served model has the fingerprint of its model, so a table resumes with either and sends nothing."""
    (tmp_path / "weights.safetensors").write_bytes(b"a")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    model = VllmModel(identifier="m", model_name=str(tmp_path), vllm_kwargs={"max_model_len": 64})
    arguments = json.loads(model.engine_config().engine_args)
    known = ModelFacts(engine_identity(arguments), of_files(arguments))
    served = api_of(model, known, "name", "http://127.0.0.1:1", "key")
    said = model.model_copy(update={"chat": template is not None})
    over = [asked.prepare(asked.predict_in_db).over("text") for asked in (model, served, said)]
    assert over[0].fingerprint == over[1].fingerprint == over[2].fingerprint
