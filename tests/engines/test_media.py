"""Pictures that a real model sees, in an engine of its own and behind vLLM's server."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_vision_model
from tests.conftest import ENGINE_PYTHON, TINY_ARGS
from tests.engines.test_server import KEY, VllmServer
from tests.eventually import LONG_ENOUGH
from tests.places import Place
from vllm_tasks import RowError, VllmAPI, VllmModel
from vllm_tasks.engines.local.python import interpreter
from vllm_tasks.results import Completion
from vllm_tasks.serving.api import command_line

pytestmark = pytest.mark.engine

ARGUMENTS = {**TINY_ARGS, "dtype": "float32"}
SAMPLING = {"temperature": 0, "max_tokens": 6, "logprobs": 0}
FIELDS = {"images": "photo", "signature": "**kwargs", "prompt": "What is {what}?", "predict_kwargs": SAMPLING}


def png(red: int, blue: int, side: int = 8) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes((red, 0, blue)) * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


RED, BLUE = png(255, 0), png(0, 255)
ROWS = [{"what": "it", "photo": photo} for photo in (RED, BLUE, RED, [RED, BLUE], [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    command = [interpreter(os.environ.get(ENGINE_PYTHON, "")), "-m", tiny_vision_model.__name__, folder]
    subprocess.run(command, check=True, timeout=LONG_ENOUGH)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[VllmModel]:
    with VllmModel(identifier="m", model_name=str(folder), vllm_kwargs=ARGUMENTS, **FIELDS) as model:
        yield model


def test_the_model_sees_the_pictures(model: VllmModel) -> None:
    """Equal ones have equal answers and others have others; each takes as many tokens as the next."""
    red, blue, again, both, none = model.completions(ROWS)
    assert red == again
    assert red.choices[0].logprobs != blue.choices[0].logprobs
    assert red.prompt_tokens == blue.prompt_tokens
    assert none.prompt_tokens < red.prompt_tokens < both.prompt_tokens


def test_a_picture_that_cannot_be_decoded_is_an_error_of_its_row(model: VllmModel, tmp_path: Path) -> None:
    """In a table: vLLM's message says why, and the other row has its output."""
    place = Place(str(tmp_path / "lake"))
    place.fill([{"id": i, "what": "it", "photo": photo} for i, photo in enumerate([RED, RED[:30]])])
    report = model.predict_in_db(["what", "photo"], "rows", db=place.db, max_failed=None)
    assert (report.succeeded, report.failed) == (1, 1)
    assert place.outputs()[1]["_error"].startswith("refused: ")


@pytest.mark.long
def test_a_server_sees_the_same(model: VllmModel, folder: Path, tmp_path: Path) -> None:
    """The same request gives the same answer."""
    server = VllmServer(folder, tmp_path / "log", command_line(ARGUMENTS))
    try:
        server.start()
        server.wait()
        with VllmAPI(identifier="m", api_url=server.url, api_key=KEY, **FIELDS) as remote:
            there = remote.completions(ROWS, on_error="return")
    finally:
        server.kill()
    here = model.completions(ROWS)
    for ours, theirs in zip(here, there, strict=True):
        assert isinstance(theirs, Completion), theirs
        assert not isinstance(ours, RowError)
        assert (ours.text, ours.prompt_tokens) == (theirs.text, theirs.prompt_tokens)
