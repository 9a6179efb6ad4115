"""PARITY of likelihoods: multiple choice and rolling perplexity, by `validate` and lm-evaluation-harness.

The rows are the demo's questions with four of its topics as choices, and documents of ten questions each.
First both sides get the log-probabilities of one recording, by tokens: the harness fills it with `echo`, in
which it sends token ids, and `validate` sends texts. This shows that both score the same tokens. Then
`validate` uses the server itself, where log-probabilities differ by the rounding of other batches.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import servers
from benchmarks.children import Child
from benchmarks.harness import Harness
from benchmarks.options import Options
from flows.demo import QUESTIONS
from tests.servers.scripted_server import Asked, Reply, ScriptedServer
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmAPI

CHOICES, ROWS, DOCUMENTS = 4, 100, 30
CLOSE = 1e-6
"""The relative difference of equal figures."""
CHOOSING: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{document}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


class Recording:
    """The log-probabilities of prompts' tokens, by token ids; `reply` is a script for a `ScriptedServer`."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._known: dict[tuple[int, ...], dict[str, Any]] = {}

    async def reply(self, asked: Asked) -> Reply:
        if asked.body is None or asked.path != "/v1/completions":
            return await self._forward(asked.path, asked.body)
        ids = await self._ids(asked.body["prompt"])
        if ids not in self._known:
            body = {"model": asked.body["model"], "prompt": ids, "max_tokens": 1, "temperature": 0}
            found = await self._forward(asked.path, {**body, "prompt_logprobs": 0})
            if found.status != 200:
                return found
            self._known.setdefault(ids, json.loads(found.body))
        answer = self._known[ids]
        shown = _echoed(answer) if asked.body.get("echo") else answer
        return Reply(shown, headers={"Content-Type": "application/json"})

    async def _ids(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            found = await self._forward("/tokenize", {"prompt": prompt})
            prompt = json.loads(found.body)["tokens"]
        elif isinstance(prompt[0], list):
            (prompt,) = prompt
        return tuple(prompt)

    async def _forward(self, path: str, body: Any) -> Reply:
        method = "GET" if body is None else "POST"
        async with aiohttp.request(method, f"{self._server}{path}", json=body) as answer:
            return Reply(await answer.read(), answer.status, {"Content-Type": answer.content_type})


def _echoed(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with `prompt_logprobs` as one with `echo` and `logprobs`, whose last token is generated."""
    first, *entries = answer["choices"][0]["prompt_logprobs"]
    logprobs = [first, *(next(iter(entry.values()))["logprob"] for entry in entries), 0.0]
    found = {"token_logprobs": logprobs, "top_logprobs": [{"": logprob} for logprob in logprobs]}
    return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": found}]}


@dataclass(frozen=True)
class Ours:
    """Our side: the kind of its log-probabilities, its server and model, and a folder for its lakes."""

    kind: str
    url: str
    model: VllmAPI
    lakes: Path


def measure(options: Options) -> Iterator[str]:
    """Two lines for recorded log-probabilities, two for live ones."""
    arguments = {**options.engine_args(), "enable_tokenizer_info_endpoint": True}
    with ExitStack() as stack:
        lakes = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Child(servers.serve, arguments)).ready
        proxy = stack.enter_context(ScriptedServer(Recording(server).reply))
        proxy.tokenizes = None  # the server behind it does
        recorded = proxy.url
        choosing, documents = _choosing(), _documents()
        run = recorded, arguments["model"], options.concurrency
        with Harness(CHOOSING, choosing) as harness:
            of_choices = harness.likelihoods(*run)
        with Harness(ROLLING, documents) as harness:
            of_documents = harness.likelihoods(*run)
        for kind, url in ("recorded", recorded), ("live", server):
            model = VllmAPI(
                identifier="bench", api_url=f"{url}/v1/completions", max_in_flight=options.concurrency
            )
            ours = Ours(kind, url, model, lakes)
            with model:
                yield _choices_line(ours, choosing, of_choices)
                yield _documents_line(ours, documents, of_documents)


def _choosing() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    topics = sorted({row["topic"].replace("_", " ") for row in rows})
    draw = random.Random(0)
    made = []
    for row in draw.sample(rows, ROWS):
        right = row["topic"].replace("_", " ")
        choices = draw.sample([topic for topic in topics if topic != right], CHOICES - 1)
        label = draw.randrange(CHOICES)
        choices.insert(label, right)
        # Some prompts end in white space, which belongs to the choice.
        prompt = f"Question: {row['question']}\nTopic:{draw.choice(['', '', ' ', chr(10)])}"
        made.append({"prompt": prompt, "choices": choices, "label": label})
    return made


def _documents() -> list[dict[str, Any]]:
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()]
    size = len(questions) // DOCUMENTS
    return [{"document": "\n".join(questions[i * size : (i + 1) * size])} for i in range(DOCUMENTS)]


def _choices_line(us: Ours, rows: Sequence[dict[str, Any]], theirs: list[list[float]]) -> str:
    """Rows with the same log-probability of each choice, and the same choice by it and per character."""
    options = {"choices": "choices", "delimiter": " "}
    metrics = [
        Metric(identifier="acc", object="multiple_choice", options=options),
        Metric(
            identifier="acc_norm", object="multiple_choice", options={**options, "normalize": "characters"}
        ),
    ]
    ours = _scores(us.model, us.lakes / f"choices-{us.kind}", metrics, rows, ("prompt", "label"))
    pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
    flat = [logprob for logprobs in theirs for logprob in logprobs]
    gaps = _gaps(us, "texts", pairs, " ", flat)
    equal = 0
    for i, (row, found, logprobs) in enumerate(zip(rows, ours, theirs, strict=True)):
        per_character = [p / len(c) for p, c in zip(logprobs, row["choices"], strict=True)]
        wanted = [float(v.index(max(v)) == row["label"]) for v in (logprobs, per_character)]
        close = max(gaps[i * CHOICES : (i + 1) * CHOICES]) <= CLOSE
        equal += close and [found["acc"], found["acc_norm"]] == wanted
    accuracy = sum(found["acc"] for found in ours) / len(ours)
    return (
        f"PARITY {equal}/{len(rows)} equal multiple choice, {us.kind} log-probabilities "
        f"(acc {accuracy:.3f}, largest relative difference {max(gaps):.1e})"
    )


def _documents_line(us: Ours, rows: Sequence[dict[str, Any]], theirs: list[list[float]]) -> str:
    """Documents whose log-probability is the same, after the token that begins a document."""
    known = _json(f"{us.url}/tokenizer_info")
    begin = known.get("bos_token") or known["eos_token"]
    pairs = [(begin, row["document"]) for row in rows]
    gaps = _gaps(us, "documents", pairs, "", [own for (own,) in theirs])
    equal = sum(gap <= CLOSE for gap in gaps)
    return (
        f"PARITY {equal}/{len(rows)} equal rolling perplexity, {us.kind} log-probabilities "
        f"(largest relative difference {max(gaps):.1e})"
    )


def _gaps(
    us: Ours, lake: str, pairs: Sequence[tuple[str, str]], delimiter: str, theirs: Sequence[float]
) -> list[float]:
    """The relative differences of the log-probabilities of texts after their prompts."""
    asked = [{"prompt": prompt, "text": text} for prompt, text in pairs]
    perplexity = Metric(identifier="perplexity", options={"delimiter": delimiter})
    ours = _scores(us.model, us.lakes / f"{lake}-{us.kind}", [perplexity], asked, ("prompt", "text"))
    gaps = []
    for (prompt, text), found, other in zip(pairs, ours, theirs, strict=True):
        alone, whole = (
            len(_json(f"{us.url}/tokenize", {"prompt": each})["tokens"])
            for each in (prompt.rstrip(), prompt + delimiter + text)
        )
        gaps.append(abs((alone - whole) * math.log(found["perplexity"]) / other - 1))
    return gaps


def _json(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _scores(
    model: VllmAPI, lake: Path, metrics: list[Metric], rows: Sequence[dict[str, Any]], key: tuple[str, str]
) -> list[dict[str, float]]:
    """Our scores of the rows, in their order, by metric."""
    lake.mkdir()
    validation = Validation(
        datasets=[Dataset(identifier="rows", raw_data=list(rows))],
        metrics=metrics,
        key=key,
    )
    (report,) = model.validate(validation, db=str(lake)).datasets
    select = f"""
        SELECT inputs.input, inputs.target, scores.metric, scores.score
        FROM "{report.dataset_table}" AS inputs
        JOIN _metric_scores AS scores ON scores."row" = inputs."row" AND scores.run = '{report.run}'
    """
    tables = Datalayer(url=str(lake)).tables()  # type: ignore[arg-type]  # becomes a SecretStr
    try:
        found = [dict(row) for batch in tables.read(select) for row in batch]
    finally:
        tables.close()
    scores: dict[tuple[Any, Any], dict[str, float]] = {}
    for row in found:
        place = json.loads(row["input"])[0], json.loads(row["target"])
        scores.setdefault(place, {})[row["metric"]] = row["score"]
    return [scores[row[key[0]], row[key[1]]] for row in rows]
