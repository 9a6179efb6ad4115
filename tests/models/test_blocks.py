"""Models as Prefect blocks, through a real server: saved, edited in code and in the UI, loaded."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.objects import BlockType
from prefect.settings import get_current_settings
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import SecretStr, ValidationError
from pydantic_core import to_jsonable_python

from tests.conftest import IN_PREFECT
from tests.eventually import LONG_ENOUGH
from vllm_tasks import (
    Artifact,
    Classes,
    Datalayer,
    Dataset,
    DataType,
    InvalidCall,
    Metric,
    Validation,
    VllmAPI,
    VllmModel,
)
from vllm_tasks.calls.prompts import joined
from vllm_tasks.calls.sampling import known_names
from vllm_tasks.errors import near
from vllm_tasks.flows.batch_predict import batch_predict
from vllm_tasks.flows.compare_models import compare_models
from vllm_tasks.flows.validate_model import validate_model

pytestmark = IN_PREFECT
BOTH = pytest.mark.parametrize("kind", [VllmAPI, VllmModel])
SECRET_URL = "postgresql://user:db-secret@host/db"


@pytest.fixture
def name() -> str:
    """A name that no other test of the session's server uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


def python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with the session's server."""
    server = {"PREFECT_API_URL": str(get_current_settings().api.url), "PREFECT_HOME": str(home)}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **server},
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH,
    )


def full(kind: type[VllmAPI] | type[VllmModel], **fields: Any) -> VllmAPI | VllmModel:
    """A model with all its fields set, except `output_schema`, which excludes `datatype`."""
    common: dict[str, Any] = {
        "identifier": "org/full",
        "artifacts": {"rules": Artifact(uri="memory://rules.json", datatype="json")},
        "signature": "*args,**kwargs",
        "datatype": DataType(identifier="mine", encoder=joined, decoder=known_names),
        "flatten": True,
        "model_update_kwargs": {"table": "t"},
        "predict_kwargs": {"temperature": 0, "stop": ["a", "b"], "seed": None},
        "compute_kwargs": {"num_gpus": 1, "env": {"A": "1"}, "tolerations": [{"key": "gpu"}]},
        "validation": Validation(
            datasets=[Dataset(identifier="d", select="t", db="prod", sample_size=3)],
            metrics=[Metric(identifier="exact_match"), Metric(identifier="own", object=near)],
            key=("q", "a"),
            thresholds={"exact_match": 0.5},
        ),
        "metric_values": {"d": {"exact_match": 0.25}},
        "prompt": "{artifacts.rules} {0} {name} {{}}",
        "prompt_func": joined,
        "max_batch_size": None,
        "chat": True,
        "system": "S",
    }
    if kind is VllmAPI:
        common |= {"api_url": ["http://a", "http://b"], "api_key": "sk-secret", "model": "m", "timeout": 7.5}
        common |= {"headers": {"X-Api-Key": "sk-secret"}}
    else:
        common |= {"model_name": "org/m", "vllm_kwargs": {"seed": 1}, "ray_address": "auto", "replicas": 2}
    return kind(**{**common, **fields})


def dumped(model: VllmAPI | VllmModel) -> dict[str, Any]:
    return model.model_dump(exclude={"db", "api_key"})


# ---------------------------------------------------------------------- save and load


@BOTH
def test_a_model_with_all_fields_survives_save_and_load(
    kind: type[VllmAPI] | type[VllmModel], name: str
) -> None:
    """The loaded model equals the saved one, identity, secrets and callables included."""
    model = full(kind, db=Datalayer(url=SECRET_URL))
    model.save(name)
    loaded = kind.load(name)
    assert isinstance(loaded, kind)
    assert dumped(loaded) == dumped(model)
    assert loaded.prompt_func is joined
    assert isinstance(loaded.datatype, DataType)
    assert loaded.datatype.decoder is known_names
    assert loaded.validation is not None
    assert loaded.validation.metrics[1].object is near
    assert loaded.db is not None
    assert loaded.db.url.get_secret_value() == SECRET_URL
    if isinstance(loaded, VllmAPI):
        assert loaded.api_key is not None
        assert loaded.api_key.get_secret_value() == "sk-secret"
        assert loaded.headers is not None
        assert loaded.headers.get_secret_value() == {"X-Api-Key": "sk-secret"}
    else:
        assert loaded.on_ray


@BOTH
def test_classes_survive_save_and_load(kind: type[VllmAPI] | type[VllmModel], name: str) -> None:
    """In their order, which decides their letters."""
    classes = Classes({"wish": "something new", "bug": None, "a": "b"}, review_below=0.75)
    full(kind, datatype=classes, flatten=False, predict_kwargs={}).save(name)
    loaded = kind.load(name)
    assert isinstance(loaded, kind)
    assert loaded.datatype == classes


@BOTH
@pytest.mark.parametrize(
    "schema",
    [
        {"a": "int", "b": "json"},
        {
            "$defs": {"A": {"type": "integer"}},
            "type": "object",
            "properties": {"b": {"type": "string"}, "a": {"$ref": "#/$defs/A"}},
        },
        "vllm_tasks.calls.answers.Artifact",
    ],
    ids=["columns", "JSON Schema", "pydantic"],
)
def test_an_output_schema_survives_save_and_load(kind: Any, name: str, schema: Any) -> None:
    """Each of its forms comes back as it was."""
    kind(identifier="m", output_schema=schema).save(name)
    assert kind.load(name).output_schema == schema


@BOTH
def test_a_minimal_model_survives_save_and_load(kind: Any, name: str) -> None:
    """Defaults come back as defaults."""
    model = kind(identifier="m")
    model.save(name)
    assert kind.load(name).model_dump() == model.model_dump()


@BOTH
def test_a_loaded_model_can_be_edited_and_saved_again(kind: Any, name: str) -> None:
    """A changed field comes back changed, all others, the key too, as they were."""
    full(kind, db=Datalayer(url=SECRET_URL)).save(name)
    loaded = kind.load(name)
    loaded.prompt = "Q: {0}"
    loaded.predict_kwargs = {"max_tokens": 9}
    loaded.save(name, overwrite=True)
    again = kind.load(name)
    assert (again.prompt, again.predict_kwargs) == ("Q: {0}", {"max_tokens": 9})
    assert dumped(again) == dumped(loaded)
    assert again.db.url.get_secret_value() == SECRET_URL
    if kind is VllmAPI:
        assert again.api_key.get_secret_value() == "sk-secret"


def test_saving_under_a_taken_name_needs_overwrite(name: str) -> None:
    """A saved model is not replaced by accident."""
    VllmAPI(identifier="a").save(name)
    with pytest.raises(ValueError, match="overwrite"):
        VllmAPI(identifier="b").save(name)
    assert VllmAPI.load(name).identifier == "a"


def test_a_saved_datalayer_is_stored_as_a_reference(name: str) -> None:
    """A model with a saved datalayer sees later changes of it."""
    db = Datalayer(url=SECRET_URL)
    db.save(name)
    VllmAPI(identifier="m", db=db).save(name)
    Datalayer(url="/elsewhere").save(name, overwrite=True)
    loaded = VllmAPI.load(name)
    assert loaded.db is not None
    assert loaded.db.url.get_secret_value() == "/elsewhere"


@BOTH
def test_an_edit_in_the_ui_changes_one_field(kind: Any, name: str) -> None:
    """The form sends the changed data; fields that it does not send stay, secrets too."""
    full(kind, db=Datalayer(url=SECRET_URL)).save(name)
    slug = kind.get_block_type_slug()
    with get_client(sync_client=True) as client:
        document = client.read_block_document_by_name(name, slug, include_secrets=False)
        client.update_block_document(
            document.id,
            BlockDocumentUpdate(
                block_schema_id=document.block_schema_id,
                data={
                    "prompt": "UI: {0}",
                    "prompt_func": "vllm_tasks.calls.prompts.is_messages",
                    "max_batch_size": 8,
                },
                merge_existing_data=True,
            ),
        )
    loaded = kind.load(name)
    assert (loaded.prompt, loaded.max_batch_size) == ("UI: {0}", 8)
    assert loaded.prompt_func.__name__ == "is_messages"
    assert loaded.system == "S"
    assert loaded.db.url.get_secret_value() == SECRET_URL
    if kind is VllmAPI:
        assert loaded.api_key.get_secret_value() == "sk-secret"


def test_a_wrong_edit_in_the_ui_is_refused_at_load(name: str) -> None:
    """Nobody who edits a block can make it call code outside of the allowed modules."""
    VllmAPI(identifier="m").save(name)
    with get_client(sync_client=True) as client:
        document = client.read_block_document_by_name(name, "vllm-api")
        client.update_block_document(
            document.id, BlockDocumentUpdate(data={"prompt_func": "os.system"}, merge_existing_data=True)
        )
    with pytest.raises(RuntimeError) as refused:
        VllmAPI.load(name)
    assert "'os.system' is outside" in str(refused.value.__cause__)


# ---------------------------------------------------------------------- secrets


@BOTH
def test_secrets_are_stored_encrypted_and_shown_to_nobody(kind: Any, name: str) -> None:
    """Neither reprs nor the API without `include_secrets` contain a key or password."""
    model = full(kind, db=Datalayer(url=SECRET_URL))
    model.save(name)
    with get_client(sync_client=True) as client:
        shown = client.read_block_document_by_name(name, kind.get_block_type_slug(), include_secrets=False)
        told = client.read_block_document_by_name(name, kind.get_block_type_slug(), include_secrets=True)
    for text in (repr(model), str(model), repr(kind.load(name)), str(shown.data), shown.model_dump_json()):
        assert "sk-secret" not in text
        assert "db-secret" not in text
    assert "db-secret" in str(told.data)
    assert ("sk-secret" in str(told.data)) is (kind is VllmAPI)


@pytest.mark.parametrize("kind", [VllmAPI, VllmModel])
def test_a_model_is_a_parameter_of_a_deployments_run(kind: Any) -> None:
    """`run_deployment(..., parameters={"model": model})` sends its fields, with a slug that Prefect adds."""
    schema = parameter_schema(batch_predict).model_dump_for_openapi()
    model = kind(identifier="m", db=Datalayer(url=SecretStr("data/")))
    sent = to_jsonable_python({"model": model, "X": "text", "select": "rows"})
    assert sent["model"]["block_type_slug"] == kind.get_block_type_slug()
    assert validate(sent, schema) == []
    (wrong,) = validate({**sent, "model": {**sent["model"], "identfier": "x"}}, schema)
    assert "identfier" in str(wrong)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (VllmAPI, {"identifier": "m", "api_key": "**********"}),
        (VllmAPI, {"identifier": "m", "api_key": SecretStr("***")}),
        (VllmAPI, {"identifier": "m", "basic_auth": "**********"}),
        (VllmAPI, {"identifier": "m", "headers": {"X-Key": "**********"}}),
        (VllmAPI, {"identifier": "m", "headers": "**********"}),
        (Datalayer, {"url": "**********"}),
    ],
)
def test_the_mask_of_a_secret_is_no_secret(kind: Any, fields: dict[str, Any]) -> None:
    """Parameters of a flow run carry no secrets; a server would refuse such a key, row by row."""
    with pytest.raises(ValidationError, match="stands for a secret and is none"):
        kind(**fields)


def test_the_key_is_a_secret_of_the_block_type() -> None:
    """Prefect knows which fields to encrypt, the nested datalayer's too."""
    secret = VllmAPI.model_json_schema()["secret_fields"]
    assert set(secret) >= {"api_key", "db.url"}
    assert isinstance(VllmAPI(identifier="m", api_key="k").api_key, SecretStr)


# ---------------------------------------------------------------------- callables


def local_function(x: str) -> str:
    return x


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_func": lambda x: x},
        {"datatype": DataType(identifier="d", decoder=lambda x: x)},
        {"datatype": DataType(identifier="d", encoder=lambda x: x)},
        {
            "validation": Validation(
                datasets=[Dataset(identifier="d", select="t")],
                metrics=[Metric(identifier="m", object=lambda p, t: 1.0)],
                key=("x", "y"),
            )
        },
    ],
)
def test_a_lambda_is_refused_by_every_way_to_save(fields: dict[str, Any], name: str) -> None:
    """A callable that could not be loaded again is refused at saving, with the way out."""
    model = VllmAPI(identifier="m", **fields)
    for save in (
        lambda: model.save(name),
        lambda: model.save(name, overwrite=True),
        lambda: asyncio.run(model.asave(name)),
    ):
        with pytest.raises(InvalidCall, match=r"<lambda>.*cannot be saved; define it at the top level"):
            save()
    with pytest.raises(ValueError, match="Unable to find block document"):
        VllmAPI.load(name)


def test_a_function_of_a_script_is_refused(tmp_path: Path) -> None:
    """`__main__` is a different module wherever the block is loaded."""
    code = "\n".join(
        [
            "from vllm_tasks import VllmAPI",
            "def ask(x): return x",
            "try: VllmAPI(identifier='m', prompt_func=ask).save('never')",
            "except ValueError as error: print(error)",
        ]
    )
    said = python("-c", code, home=tmp_path)
    assert "'__main__.ask' is defined in a script and cannot be saved" in said.stdout


def test_a_function_outside_the_allowed_modules_is_refused_when_saved(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that this site could not load again is not saved; with the setting it is."""
    model = VllmAPI(identifier="m", prompt_func=local_function)
    with pytest.raises(InvalidCall, match="VLLM_TASKS_CALLABLE_PREFIXES"):
        model.save(name)
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", f'["{__name__}"]')
    model.save(name)
    assert VllmAPI.load(name).prompt_func is local_function


def test_asynchronous_save_and_load_work(name: str) -> None:
    """`asave` and `aload` are the same as `save` and `load`."""

    async def there_and_back() -> VllmAPI:
        await VllmAPI(identifier="m", prompt_func=joined).asave(name)
        return await VllmAPI.aload(name)

    assert asyncio.run(there_and_back()).prompt_func is joined


# ---------------------------------------------------------------------- registration


def test_the_package_registers_its_blocks_from_the_command_line(tmp_path: Path) -> None:
    """`prefect block register -m vllm_tasks` finds all three."""
    said = python("-m", "prefect", "block", "register", "-m", "vllm_tasks", home=tmp_path)
    assert said.returncode == 0, said.stderr
    for block in ("vLLM API", "vLLM Model", "vLLM Datalayer"):
        assert block in said.stdout
    with get_client(sync_client=True) as client:
        assert client.read_block_type_by_slug("vllm-model").name == "vLLM Model"


def test_prefect_finds_the_package_by_its_entry_point() -> None:
    """A server with this package installed knows its blocks without a manual import."""
    (found,) = [e for e in entry_points(group="prefect.collections") if e.name == "vllm_tasks"]
    assert found.load().VllmAPI is VllmAPI


class StandardSuite(BlockStandardTestSuite):
    """Prefect's own tests of a block."""

    def test_has_a_valid_image(self, block: Any) -> None:
        """A block has no logo: any host may be out of reach, and the page would show a broken picture."""
        assert block._logo_url is None

    def test_its_descriptions_are_plain_text(self, block: Any) -> None:
        """Forms print the descriptions of fields as they are, so there is no markup in them."""
        assert [text for text in descriptions(block.model_json_schema()) if set("`<") & set(text)] == []


def descriptions(schema: Any) -> Iterator[str]:
    """The descriptions of all fields in a schema."""
    if isinstance(schema, dict):
        for field in schema.get("properties", {}).values():
            yield field.get("description", "")
        for part in schema.values():
            yield from descriptions(part)


def test_a_picture_within_a_block_type_could_not_be_loaded() -> None:
    """Prefect's server keeps a logo as a data URI, but its clients refuse every block of such a type."""
    with pytest.raises(ValidationError, match=r"scheme should be .http. or .https."):
        BlockType(name="n", slug="s", logo_url="data:image/svg+xml;base64,PHN2Zy8+")


@pytest.mark.parametrize("deployed", [batch_predict, validate_model, compare_models])
def test_the_descriptions_of_parameters_are_plain_text(deployed: Any) -> None:
    """Forms of deployments print them as they are, too."""
    assert [text for text in descriptions(deployed.parameters.model_dump()) if set("`<") & set(text)] == []


class TestVllmAPI(StandardSuite):
    @pytest.fixture
    def block(self) -> type[VllmAPI]:
        return VllmAPI


class TestVllmModel(StandardSuite):
    @pytest.fixture
    def block(self) -> type[VllmModel]:
        return VllmModel


class TestDatalayer(StandardSuite):
    @pytest.fixture
    def block(self) -> type[Datalayer]:
        return Datalayer


@pytest.mark.parametrize("block", [VllmAPI, VllmModel, Datalayer])
def test_the_page_of_a_block_has_an_example(block: type[Block]) -> None:
    """Prefect's UI prints what stands between fences; it is code that names the block."""
    example = block.get_code_example() or ""
    (code,) = re.findall(r"```python\n(.*?)```", example, re.DOTALL)
    assert f"{block.__name__}.load" in code
    compile(code, "example", "exec")
