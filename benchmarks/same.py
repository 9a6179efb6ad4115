"""SAME: a lake, SQLite and PostgreSQL get the same outputs for the same rows, from a real vLLM server.

The first runs are live, the second ones replay the answers of the first live run, and the third ones have
nothing left to process. Live answers may differ between runs, as greedy decoding is not fully deterministic
across batches. Replayed answers must give equal rows, in every column but the times.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.workload import questions
from vllm_tasks import Datalayer, VllmAPI

ROWS = 500
SAMPLING = {"temperature": 0, "max_tokens": 32}
OWN_TIME = {"_created_at", "_uuid"}


def measure(options: Options) -> Iterator[str]:
    """One line for live answers, one for recorded answers, and one for the rerun."""
    from tests.places import Place
    from tests.servers.postgres import running
    from tests.servers.scripted_server import Asked, Reply, ScriptedServer

    texts = questions(options.data, ROWS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(running())
        urls = {
            "lake": str(folder / "lake"),
            "SQLite": f"sqlite:///{folder}/tables.db",
            "PostgreSQL": postgres.new_database(),
        }
        for url in urls.values():
            Place(url).fill_texts(*texts)
        with Child(servers.serve, options.engine_args()) as server:
            live = {name: run(url, server.ready, "live") for name, url in urls.items()}
        yield f"SAME {agreement(live)} of {ROWS} live answers agree, by pairs of datalayers"

        recorded = {texts[key]: row for key, row in live["lake"].items()}

        def replay(asked: Asked) -> Reply | None:
            if asked.body is None:
                return None
            row = recorded[asked.prompt]
            choice = {"index": 0, "text": row["output"], "finish_reason": row["_finish_reason"]}
            usage = {"prompt_tokens": row["_prompt_tokens"], "completion_tokens": row["_completion_tokens"]}
            return Reply({"model": row["_model"], "choices": [choice], "usage": usage})

        with ScriptedServer(replay) as server_of_records:
            again = {name: run(url, server_of_records.url, "recorded") for name, url in urls.items()}
            equal = [again["lake"] == outputs for outputs in again.values()]
            yield f"SAME {sum(equal)} of {len(equal)} datalayers have equal rows with recorded answers"
            posts = len(server_of_records.posts)
            seconds = [rerun(url, server_of_records.url) for url in urls.values()]
            sent = len(server_of_records.posts) - posts
        yield f"SAME {max(seconds):.2f} s at most for a rerun, {sent} requests sent; goal < 3 s and none"


def model_of(server: str) -> VllmAPI:
    return VllmAPI(identifier="same", api_url=f"{server}/v1/completions", model=None, predict_kwargs=SAMPLING)


def run(url: str, server: str, predict_id: str) -> dict[int, Mapping[str, Any]]:
    """The outputs by key, without the columns that differ between any two runs."""
    with model_of(server) as model:
        report = model.predict_in_db("text", "rows", db=url, predict_id=predict_id)
    assert report.succeeded == ROWS, report
    rows = Datalayer(url=url).outputs(predict_id).to_pylist()  # type: ignore[arg-type]  # becomes a SecretStr
    return {row["id"]: {k: v for k, v in row.items() if k not in OWN_TIME} for row in rows}


def rerun(url: str, server: str) -> float:
    started = time.perf_counter()
    with model_of(server) as model:
        report = model.predict_in_db("text", "rows", db=url, predict_id="recorded")
    assert report.processed == 0, report
    return time.perf_counter() - started


def agreement(live: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The percentage of rows with the same output, for each pair of datalayers."""
    percentages = [
        f"{sum(a[key]['output'] == b[key]['output'] for key in a) / len(a):.1%}"
        for a, b in itertools.combinations(live.values(), 2)
    ]
    return ", ".join(percentages)
