"""Keys of artifacts, by which Prefect groups versions."""

from __future__ import annotations

import re

import pytest

from vllm_tasks.artifacts import asset_key, slug, validation_key


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


def test_pairs_of_names_that_read_the_same_keep_apart() -> None:
    """A model and a data set have a key of their own, whatever dashes they have."""
    pairs = [
        ("a", "b-c"),
        ("a-b", "c"),
        ("a-b-c", "d"),
        ("a", "b-c-d"),
        ("a-b", "c-d"),
        ("a_b", "c"),
        ("a", "b c"),
    ]
    keys = [validation_key(*pair) for pair in pairs[:-1]]
    assert len(set(keys)) == len(keys)
    assert keys[1:3] == ["a-b-c-validation", "a-b-c-d-validation"]
    assert re.fullmatch("a-b-c-[0-9a-f]{6}-validation", keys[0])
    assert validation_key(*pairs[-1]) == keys[0], "a space is a dash in all keys"
    hashed = keys[0].removesuffix("-validation").rpartition("-")
    assert validation_key(hashed[0], hashed[2]) != keys[0]
    assert len({slug("comparison", *names) for names in [("a", "b", "c"), ("a-b", "c"), ("a", "b-c")]}) == 3
    assert slug("comparison", "a", "b") == "comparison-a-b"


def test_long_names_keep_apart() -> None:
    """A key is shortened, and its end says of what."""
    keys = {slug("comparison", *(f"model{i}" for i in range(n))) for n in (50, 51)}
    assert len(keys) == 2
    assert all(190 < len(key) <= 200 for key in keys)


@pytest.mark.parametrize(
    ("first", "second"), [("/a b/t", "/a_b/t"), ("/a#b/t", "/a?b/t"), ("/" + "a" * 600, "/" + "a" * 601)]
)
def test_tables_whose_locations_lose_characters_are_two_assets(first: str, second: str) -> None:
    """Each key is one that Prefect takes."""
    keys = {asset_key(first), asset_key(second)}
    assert len(keys) == 2
    assert all(len(key) <= 512 and re.fullmatch("[!-~]+", key) for key in keys)
    assert asset_key("/lake/t") == "file:///lake/t"
