"""PARITY: lm-evaluation-harness and `validate` give each of the same rows the same score.

Both use the same vLLM server, with GSM8K, no examples, greedy decoding and 64 tokens. First they use a proxy
that records answers: lm-evaluation-harness fills it, and `validate` gets the recorded answer to each equal
request. This shows that the requests are the same, and that equal answers get equal scores. Then `validate`
uses the server itself. Live answers may differ, as greedy decoding is not fully deterministic across batches.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from benchmarks import servers
from benchmarks.children import Child
from benchmarks.harness import Harness, Outcome, ScoredRow
from benchmarks.options import Options
from benchmarks.workload import questions
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmAPI, validate
from vllm_tasks.results import ValidationReport

DATASET, OURS, THEIRS = "gsm8k", "numeric_match", "flexible-extract"
"""`OURS` also names the task's filter that extracts the same number from an answer as our metric; `THEIRS` is
the filter of lm-evaluation-harness's own task `gsm8k`."""
NUMBER = (
    r"(?:(?<![\w.,%)\]}])-)?\$?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+)?"
)
FIRST_MARKED_OR_LAST = rf"####[ \t]*({NUMBER})(?s:.*)|({NUMBER})"
"""The last match is a number after `####`, since that match extends to the end, or else the last number."""
STOP = ["Question:", "</s>", "<|im_end|>"]
"""The stop words of lm-evaluation-harness's own task `gsm8k`."""
TASK: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": STOP, "do_sample": False, "temperature": 0.0, "max_gen_toks": 64},
    "filter_list": [
        {
            "name": name,
            "filter": [
                {"function": "regex", "regex_pattern": pattern, "group_select": -1},
                {"function": "take_first"},
            ],
        }
        for name, pattern in {
            OURS: FIRST_MARKED_OR_LAST,
            THEIRS: "(-?[$0-9.,]{2,})|(-?[0-9]+)",
        }.items()
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            # As in its `gsm8k`, plus the zeros, because it compares texts and we compare numbers.
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.0*$"],
        }
    ],
}
PROMPT = "Question: {input}\nAnswer:"
SAMPLING = {"temperature": 0.0, "max_tokens": 64, "stop": STOP, "seed": 1234}
"""The parameters that lm-evaluation-harness sends for `TASK`."""


def measure(options: Options) -> Iterator[str]:
    """One line for the requests, two for scores of recorded answers, one for live answers."""
    from benchmarks.recording import Recording, canonical
    from tests.servers.scripted_server import ScriptedServer

    rows = labelled(options.data, options.rows)
    arguments = options.engine_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(prefect_test_harness(server_startup_timeout=120))
        server = stack.enter_context(Child(servers.serve, arguments))
        recording = Recording(server.ready)
        to_theirs, to_ours = (stack.enter_context(ScriptedServer(recording.reply)) for _ in range(2))
        harness = stack.enter_context(Harness(TASK, rows))

        theirs = harness.run(to_theirs.url, arguments["model"], options.concurrency)
        recorded = len(recording.answers)
        ours = validated(model_of(to_ours.url, options.concurrency), rows, folder / "recorded")
        sent = [Counter(canonical(post.body) for post in proxy.posts) for proxy in (to_theirs, to_ours)]
        live = validated(model_of(server.ready, options.concurrency), rows, folder / "live")
    new = len(recording.answers) - recorded
    yield (
        f"PARITY {(sent[0] & sent[1]).total()}/{len(rows)} requests equal; sent {sent[0].total()} and "
        f"{sent[1].total()}, {new} of ours were not recorded"
    )
    yield f"PARITY recorded answers: {agreement(theirs, ours, OURS)}"
    yield f"PARITY ... scored with its own filter {THEIRS}: {agreement(theirs, ours, THEIRS)}"
    yield f"PARITY live answers: {agreement(theirs, live, OURS)}"


def labelled(data: Path | None, count: int, seed: int = 0) -> list[dict[str, str]]:
    """At most `count` rows with distinct `question`; each `answer` ends in `#### <number>`.

    They come from a JSONL file in shuffled order, or are made up.
    """
    if data is None:
        return [
            {"question": text, "answer": f"Because.\n#### {i % 50}"}
            for i, text in enumerate(questions(None, count))
        ]
    with data.open(encoding="utf-8") as lines:
        found = {row["question"]: row["answer"] for row in map(json.loads, lines)}
    chosen = random.Random(seed).sample(sorted(found), min(count, len(found)))
    return [{"question": question, "answer": found[question]} for question in chosen]


def model_of(server: str, concurrency: int) -> VllmAPI:
    return VllmAPI(
        identifier="bench",
        api_url=f"{server}/v1/completions",
        max_in_flight=concurrency,
        prompt=PROMPT,
        predict_kwargs=SAMPLING,
    )


def validated(model: VllmAPI, rows: Sequence[dict[str, str]], lake: Path) -> Outcome:
    """The outcome of `validate` over the rows, in a flow, with the seconds that it took there."""
    validation = Validation(
        datasets=[Dataset(identifier=DATASET, raw_data=list(rows))],
        metrics=[Metric(identifier=OURS)],
        key=("question", "answer"),
    )

    @flow
    def nightly() -> tuple[ValidationReport, float]:
        started = time.perf_counter()
        report = validate(model, validation, db=str(lake))
        return report, time.perf_counter() - started

    report, seconds = nightly()
    (found,) = report.datasets
    scored = scored_by_question(lake, found.dataset_table, model.identifier, found.run)
    in_order = [scored[row["question"]] for row in rows]
    return Outcome(seconds, report.metric_values[DATASET], {OURS: in_order})


def scored_by_question(lake: Path, dataset: str, model: str, run: str) -> dict[str, ScoredRow]:
    """The rows of a run, by question, from the tables of the lake."""
    from vllm_tasks.metrics.numeric_match import number_in

    select = f"""
        SELECT inputs.input, answers.output, scores.score FROM "{dataset}" AS inputs
        JOIN "_outputs__{model}-on-{DATASET}" AS answers
            ON answers."row" = inputs."row" AND answers.run = '{run}'
        JOIN _metric_scores AS scores ON scores."row" = inputs."row" AND scores.run = '{run}'
    """
    tables = Datalayer(url=str(lake)).tables()  # type: ignore[arg-type]  # becomes a SecretStr
    try:
        found = [dict(row) for batch in tables.read(select) for row in batch]
    finally:
        tables.close()
    scored = {}
    for row in found:
        (question,) = json.loads(row["input"])
        extracted = number_in(row["output"])
        number = "" if extracted is None else str(extracted)
        scored[question] = ScoredRow(row["output"], number, row["score"])
    return scored


def agreement(theirs: Outcome, ours: Outcome, name: str) -> str:
    """The numbers of rows with equal answers, numbers and scores, by their filter `name`."""
    pairs = list(zip(theirs.rows[name], ours.rows[OURS], strict=True))
    equal = [
        (a.answer == b.answer, value_of(a.extracted) == value_of(b.extracted), a.score == b.score)
        for a, b in pairs
    ]
    answers, numbers, scores = (sum(column) for column in zip(*equal, strict=True))
    return (
        f"{sum(map(all, equal))}/{len(pairs)} equal ({answers} answers, {numbers} numbers, {scores} scores); "
        f"exact_match {theirs.values[name]:.4f}, {OURS} {ours.values[OURS]:.4f}"
    )


def value_of(extracted: str) -> Decimal | None:
    """The extracted number in any spelling, as a Decimal; None if there is none."""
    try:
        return Decimal(extracted.replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
