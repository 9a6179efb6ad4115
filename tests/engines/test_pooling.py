"""Tasks that return numbers with the real vLLM, beside the numbers of transformers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_model as tiny_model_file
from tests.conftest import ENGINE_PYTHON, TINY_ARGS
from tests.engines.test_server import KEY, VllmServer
from tests.eventually import LONG_ENOUGH
from tests.places import Place
from vllm_tasks import InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.engines.local.python import interpreter
from vllm_tasks.serving.api import command_line

pytestmark = pytest.mark.engine

ARGS = {**TINY_ARGS, "max_model_len": 512, "dtype": "float32"}
TEXTS = ["What is the capital of France?", "The quick brown fox", "a", "The quick brown fox"]
CLASSES = ["bug", "feature", "question"]


@pytest.fixture(scope="module")
def embedding(tiny_model: Path) -> Iterator[VllmModel]:
    """A model that could also generate, run as one that embeds."""
    with VllmModel(identifier="e", model_name=str(tiny_model), task="embed", vllm_kwargs=ARGS) as model:
        yield model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmModel]:
    folder = tmp_path_factory.mktemp("classes")
    python = interpreter(os.environ.get(ENGINE_PYTHON, ""))
    subprocess.run([python, tiny_model_file.__file__, folder, *CLASSES], check=True, timeout=LONG_ENOUGH)
    with VllmModel(identifier="c", model_name=str(folder), task="classify", vllm_kwargs=ARGS) as model:
        yield model


@contextmanager
def pooling_server(model: Path, log: Path, **arguments: object) -> Iterator[VllmServer]:
    """vLLM's own server, as a user starts it."""
    server = VllmServer(model, log, command_line({**ARGS, "runner": "pooling", **arguments}))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def embedding_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with pooling_server(tiny_model, tmp_path_factory.mktemp("server") / "log", convert="embed") as server:
        yield server


def over_http(server: VllmServer, **fields: object) -> VllmAPI:
    return VllmAPI(identifier="http", api_url=server.url, api_key=KEY, **fields)


def test_vectors_are_those_of_transformers(embedding: VllmModel) -> None:
    """vLLM normalises the state of a decoder's last token. Prompts that do not fit are errors."""
    found = np.array(embedding.predict_batches(TEXTS))
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding.model_name)
    body = transformers.AutoModel.from_pretrained(embedding.model_name, dtype=torch.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            last = body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].numpy()
        assert vector @ last / np.linalg.norm(last) > 0.999
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    good, long = embedding.predict_batches(["a", "word " * 2000], on_error="return")
    assert good == pytest.approx(found[2].tolist(), abs=1e-5)
    assert isinstance(long, RowError)
    assert long.kind == "too_long"


def test_a_table_of_vectors(embedding: VllmModel, tmp_path: Path) -> None:
    """From the engine to the lake."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*TEXTS)
    report = embedding.predict_in_db("text", "rows", db=place.db)
    assert (report.succeeded, report.completion_tokens) == (4, 0)
    answers = place.answers("e")
    assert [len(v) for v in answers.values()] == [128] * 4
    assert answers[1] == answers[3]


def test_a_score_of_an_embedding_model_is_the_cosine(embedding: VllmModel) -> None:
    """The engine is shared, because its arguments are the same."""
    scores = VllmModel(
        identifier="s", model_name=embedding.model_name, task="score", signature="*args", vllm_kwargs=ARGS
    )
    one, other = (np.array(v) for v in embedding.predict_batches(TEXTS[:2]))
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[0])]
    assert scores.predict_batches(pairs) == pytest.approx([one @ other, 1], abs=1e-4)


def test_a_task_that_the_model_does_not_have_is_refused(embedding: VllmModel) -> None:
    """The error names those that it has."""
    for task in ("classify", "generate"):
        engine = {**ARGS, "runner": "pooling"}
        model = VllmModel(
            identifier="x", model_name=embedding.model_name, task=task, vllm_kwargs=engine, chat=False
        )
        with pytest.raises(InvalidCall, match=rf"task '{task}'; as vLLM runs it, it has 'embed', 'score'"):
            model.predict("a")


def test_classes_are_those_of_transformers(classifier: VllmModel) -> None:
    """Label and probabilities of the model's head; a reward needs a head of one class."""
    found = classifier.predict_batches(TEXTS)
    reward = VllmModel(
        identifier="r", model_name=classifier.model_name, task="reward", vllm_kwargs=ARGS, chat=True
    )
    (error,) = reward.predict_batches(["a"], on_error="return")
    assert "expected one number, as from a model with one class" in error.message
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier.model_name)
    body = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier.model_name, dtype=torch.float32
    )
    for text, value in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = body(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0).numpy()
        assert value["probabilities"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert value["label"] == CLASSES[int(expected.argmax())]


def test_a_server_gives_the_vectors_of_the_engine(
    embedding: VllmModel, embedding_server: VllmServer, tmp_path: Path
) -> None:
    """Over HTTP as in process, into a table too; a prompt that does not fit is an error of its row."""
    with over_http(embedding_server, task="embed") as model:
        found = model.predict_batches(TEXTS)
        assert np.allclose(found, embedding.predict_batches(TEXTS), atol=1e-4)
        (error,) = model.predict_batches(["word " * 2000], on_error="return")
        assert isinstance(error, RowError)
        assert error.kind == "too_long"
        place = Place(str(tmp_path / "lake"))
        place.fill_texts(*TEXTS)
        report = model.predict_in_db("text", "rows", db=place.db)
        assert (report.succeeded, report.completion_tokens) == (4, 0)
        assert np.allclose(list(place.answers("http").values()), found, atol=1e-4)


def test_a_server_scores_pairs(embedding_server: VllmServer) -> None:
    """With a model that embeds, a score is the cosine of both vectors."""
    with over_http(embedding_server, task="embed") as embeds:
        one, other = (np.array(v) for v in embeds.predict_batches(TEXTS[:2]))
    with over_http(embedding_server, task="score", signature="*args") as model:
        pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[0])]
        assert model.predict_batches(pairs) == pytest.approx([one @ other, 1], abs=1e-3)


def test_a_server_that_embeds_refuses_the_other_tasks(embedding_server: VllmServer) -> None:
    """Once for the call, with the server's reason, and not as an error of each row."""
    for task in ("classify", "generate"):
        with over_http(embedding_server, task=task) as model, pytest.raises(InvalidCall) as refused:
            model.predict_batches(TEXTS)
        assert embedding_server.url in str(refused.value)


def test_a_server_gives_the_classes_of_the_engine(classifier: VllmModel, tmp_path: Path) -> None:
    """Labels and probabilities, and the reason why a head of three classes is no reward."""
    expected = classifier.predict_batches(TEXTS)
    with pooling_server(Path(classifier.model_name), tmp_path / "log") as server:
        with over_http(server, task="classify") as model:
            found = model.predict_batches(TEXTS)
        with over_http(server, task="reward") as model:
            (error,) = model.predict_batches(["a"], on_error="return")
    assert [value["label"] for value in found] == [value["label"] for value in expected]
    for mine, its in zip(found, expected, strict=True):
        assert mine["probabilities"] == pytest.approx(its["probabilities"], abs=1e-4)
    assert "expected one number, as from a model with one class" in error.message
