"""Fields that are assigned to a model, or changed in a copy of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import InvalidCall, VllmAPI


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "Summarize this."}, "uses no field of the record"),
        ({"retries": -1}, "retries Input should be greater"),
        ({"api_url": "ftp://x"}, "needs a scheme and a host"),
        ({"api_key": "*****"}, "stands for a secret"),
        ({"images": "picture"}, "names a field"),
    ],
)
def test_a_field_that_is_assigned_is_checked_when_it_is_used(
    server: ScriptedServer, wrong: dict[str, Any], said: str
) -> None:
    """As when a model is made, also in a copy; before any row is sent."""
    model = VllmAPI(identifier="m", api_url=server.url)
    copied = model.model_copy(update=wrong)
    for name, value in wrong.items():
        setattr(model, name, value)
    for each in (model, copied):
        with pytest.raises(InvalidCall, match=f"cannot be used as it is now: .*{said}"):
            each.predict_batches(["a", "b"])
        with pytest.raises(InvalidCall, match="cannot be used as it is now"):
            each.predict("a")
    assert server.posts == []


def test_a_field_that_is_assigned_gets_its_type(server: ScriptedServer) -> None:
    """A text may be assigned for a key, and fields that fit together one after another."""
    model = VllmAPI(identifier="m", api_url=server.url)
    model.api_key = "topsecret"  # type: ignore[assignment]  # as it is written
    model.prompt = "{a}"
    model.signature = "**kwargs"
    model.predict({"a": "x"})
    assert server.posts[0].headers["Authorization"] == "Bearer topsecret"
    assert "topsecret" not in repr(model)


def test_a_copy_has_the_fields_of_its_model() -> None:
    """A misspelt name would have no effect, and nobody would notice."""
    with pytest.raises(InvalidCall, match="no field 'promt'; did you mean 'prompt'"):
        VllmAPI(identifier="m").model_copy(update={"promt": "{input}"})
