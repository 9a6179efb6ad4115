"""PARITY of GSM8K from end to end: lm-evaluation-harness and `validate` give each row the same score.

Both use the same vLLM server, with no examples, greedy decoding and 64 tokens. First they use a proxy that
records answers: lm-evaluation-harness fills it, and `validate` gets the recorded answer to each equal
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

DATASET, OURS = "gsm8k", "numeric_match"
STRICT, FLEXIBLE = "strict-match", "flexible-extract"
"""The filters of lm-evaluation-harness's own task `gsm8k`."""
PATTERNS: dict[str, tuple[str, int]] = {
    STRICT: (r"#### (\-?[0-9\.\,]+)", 0),
    FLEXIBLE: (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}
"""Their patterns, and which match counts."""
IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]
"""What its `exact_match` removes from answers and targets."""
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
                {"function": "regex", "regex_pattern": pattern, "group_select": match},
                {"function": "take_first"},
            ],
        }
        for name, (pattern, match) in PATTERNS.items()
    ],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": IGNORED,
        }
    ],
}
METRICS = [
    Metric(
        identifier=name,
        object="exact_match",
        extract=[{"regex": pattern, "match": match}],
        options={"normalize": [*({"remove": ignored} for ignored in IGNORED), "lower"]},
    )
    for name, (pattern, match) in PATTERNS.items()
]
"""The same as metrics of ours."""
PROMPT = "Question: {input}\nAnswer:"
SAMPLING = {"temperature": 0.0, "max_tokens": 64, "stop": STOP, "seed": 1234}
"""The parameters that lm-evaluation-harness sends for `TASK`."""


def measure(options: Options) -> Iterator[str]:
    """One line for the requests, and for each filter one for recorded and one for live answers."""
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
        ours = validated(model_of(to_ours.url, options.concurrency), rows, folder / "recorded", METRICS)
        sent = [Counter(canonical(post.body) for post in proxy.posts) for proxy in (to_theirs, to_ours)]
        live = validated(model_of(server.ready, options.concurrency), rows, folder / "live", METRICS)
    new = len(recording.answers) - recorded
    yield (
        f"PARITY {(sent[0] & sent[1]).total()}/{len(rows)} equal GSM8K, requests (sent {sent[0].total()} and "
        f"{sent[1].total()}, {new} of ours not recorded)"
    )
    for name in PATTERNS:
        for kind, found in ("recorded", ours), ("live", live):
            yield f"PARITY {agreement(theirs, found, name, f'GSM8K by {name}, {kind} answers')}"


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


def validated(
    model: VllmAPI, rows: Sequence[dict[str, str]], lake: Path, metrics: Sequence[Metric] = ()
) -> Outcome:
    """The outcome of `validate` over the rows by `OURS` and `metrics`, in a flow, with its seconds."""
    validation = Validation(
        datasets=[Dataset(identifier=DATASET, raw_data=list(rows))],
        metrics=[Metric(identifier=OURS), *metrics],
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
    names = [metric.identifier for metric in validation.metrics]
    in_order = {name: [scored[row["question"], name] for row in rows] for name in names}
    return Outcome(seconds, report.metric_values[DATASET], in_order)


def scored_by_question(lake: Path, dataset: str, model: str, run: str) -> dict[tuple[str, str], ScoredRow]:
    """The rows of a run, by question and metric, from the tables of the lake."""
    select = f"""
        SELECT inputs.input, answers.output, scores.metric, scores.score FROM "{dataset}" AS inputs
        JOIN "_outputs__{model}-on-{DATASET}" AS answers
            ON answers."row" = inputs."row" AND answers.run = '{run}'
        JOIN _metric_scores AS scores ON scores."row" = inputs."row" AND scores.run = '{run}'
    """
    tables = Datalayer(url=str(lake)).tables()  # type: ignore[arg-type]  # becomes a SecretStr
    try:
        found = [dict(row) for batch in tables.read(select) for row in batch]
    finally:
        tables.close()
    return {
        (json.loads(row["input"])[0], row["metric"]): ScoredRow(row["output"], row["score"]) for row in found
    }


def agreement(theirs: Outcome, ours: Outcome, name: str, kind: str) -> str:
    """The number of rows with equal answers and scores, that of equal answers, and the values."""
    pairs = list(zip(theirs.rows[name], ours.rows[name], strict=True))
    answers = sum(a.answer == b.answer for a, b in pairs)
    equal = sum(a == b for a, b in pairs)
    values = f"{theirs.values[name]:.4f} and {ours.values[name]:.4f}"
    return f"{equal}/{len(pairs)} equal {kind} ({answers} equal answers; {values})"
