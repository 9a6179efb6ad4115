"""Rows with parameters of their own on a local engine: a real one, and a scripted one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.places import Place
from vllm_tasks import Request, VllmModel
from vllm_tasks.engines.local.engine import LocalConfig, LocalEngine
from vllm_tasks.results import Completion
from vllm_tasks.rows import RowError


def with_its_own(row: tuple[str, int]) -> Request:
    return Request(row[0], {"max_tokens": row[1]})


@pytest.mark.engine
def test_each_answer_is_as_long_as_its_row_asks(local_model: VllmModel) -> None:
    """Rows with different limits share one call and one engine; one that vLLM would refuse fails alone."""
    greedy = {"temperature": 0, "ignore_eos": True}
    model = local_model.model_copy(update={"prompt_func": with_its_own, "predict_kwargs": greedy})
    lengths = [1, 8, 3, 8, 16, 0, 5, 1]
    rows = [(f"The {i}", length or -1) for i, length in enumerate(lengths)]
    answers = model.completions(rows, on_error="return")
    counts = [answer.completion_tokens if isinstance(answer, Completion) else 0 for answer in answers]
    assert counts == lengths
    refused = answers[5]
    assert isinstance(refused, RowError)
    assert refused.kind == "prompt"


@pytest.mark.engine
def test_a_column_limits_each_answer(local_model: VllmModel, tmp_path: Any) -> None:
    """Over a table."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("One", "Two", "Three")
    report = local_model.predict_in_db(
        "text", "SELECT *, id + 2 AS budget FROM rows", db=place.db, predict_id="m",
        sampling_columns={"max_tokens": "budget"}, ignore_eos=True,
    )  # fmt: skip
    assert report.succeeded == 3
    assert [row["_completion_tokens"] for row in place.outputs()] == [2, 3, 4]


class RecordingHost:
    """A host that records frames and answers each row; a row with an adapter is refused as unusable."""

    model = "m"

    def __init__(self) -> None:
        self.frames: list[Any] = []
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        return await self.answers.get()

    def write(self, frame: Any) -> None:
        self.frames.append(frame)
        for row_id, prompt in frame.get("chunk", ()):
            choice = {"text": prompt, "finish_reason": "stop"}
            answer = {"row": row_id, "answer": {"choices": [choice]}, "seconds": 0.1}
            unusable = {"row": row_id, "invalid": "there is no adapter"}
            self.answers.put_nowait(unusable if "lora_request" in frame["sampling"] else answer)

    def why(self, reason: str) -> str:
        return reason

    async def end(self, grace: float = 0) -> None:
        """Nothing to end."""


def process(requests: Sequence[Request]) -> tuple[list[Any], list[Any]]:
    """The frames that the host gets for one chunk of these requests, and their results."""
    host = RecordingHost()
    results: list[Any] = [None] * len(requests)

    async def launch(_arguments: Any, _timeout: float) -> Any:
        return host, {"max_num_seqs": 4, "ranks": 1, "chat_template": False}

    async def work() -> None:
        engine = LocalEngine(LocalConfig('{"model": "m"}', start_timeout=1), launch)  # type: ignore[arg-type]
        await engine.start()
        await engine.generate(requests, results.__setitem__)
        await engine.close()

    asyncio.run(work())
    return host.frames, results


def test_a_chunk_has_one_frame_for_each_set_of_parameters() -> None:
    """Whatever their order: 8 sets in 500 rows are 8 frames."""
    sets = [{"max_tokens": n} for n in range(8)]
    requests = [Request(f"{i}", sets[i * 5 % 8]) for i in range(500)]
    frames, results = process(requests)
    assert [frame["sampling"] for frame in frames] == [sets[i * 5 % 8] for i in range(8)]
    assert [result.text for result in results] == [f"{i}" for i in range(500)]
    for frame in frames:
        assert all(sets[int(prompt) * 5 % 8] == frame["sampling"] for _, prompt in frame["chunk"])


def test_an_adapter_of_a_row_that_cannot_be_used_fails_its_rows() -> None:
    """The call goes on; an adapter of the call fails the call."""
    adapter = {"lora_request": {"lora_name": "a", "lora_path": "/a"}}
    _, (failed, good) = process([Request("a", adapter, lora=adapter["lora_request"]), Request("b", {})])
    assert (failed.kind, failed.message) == ("refused", "there is no adapter")
    assert good.text == "b"
