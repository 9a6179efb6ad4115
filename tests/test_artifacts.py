"""Keys of artifacts, by which Prefect groups versions."""

from __future__ import annotations

import re

import pytest

from vllm_tasks.artifacts import slug


@pytest.mark.parametrize("name", ["m", "my-model-on-data-2", "My Model"])
def test_plain_names_are_their_own_keys(name: str) -> None:
    """Letters in either case, digits, dashes and spaces."""
    assert slug(name) == name.lower().replace(" ", "-")


def test_names_that_lose_characters_keep_apart() -> None:
    """Each name has a hash of its complete text, and is a valid key of Prefect's."""
    names = [
        "m-a-b",
        "m-a_b",
        "m-a.b",
        "m-a--b",
        "-m-a-b",
        "m-a+b",
        "m",
        "m-问答",
        "m-答问",
        "问答",
        "答问",
        "outputs",
    ]
    keys = [slug(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", key) for key in keys)
    assert re.fullmatch("m-a-b-[0-9a-f]{6}", slug("m-a_b"))
    assert slug("M-A_B") == slug("m-a_b")
