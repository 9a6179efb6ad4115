"""PARITY: the same rows through lm-evaluation-harness and through `validate`, marked alike to the row.

Both ask the same vLLM server, GSM8K without examples, greedily, for 64 tokens. First through a proxy that
keeps the answers: lm-evaluation-harness fills it, and `validate` gets from it what equal requests got. So it
is seen that the requests are the same, and that equal answers are marked equally. Then `validate` asks the
server itself: live answers need not be equal, for greedy decoding is not quite deterministic across batches.
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
from benchmarks.harness import Harness, Marked, Outcome
from benchmarks.options import Options
from benchmarks.workload import questions
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmAPI, validate
from vllm_tasks.results import ValidationReport

DATASET, OURS, THEIRS = "gsm8k", "numeric_match", "flexible-extract"
"""`OURS` also names the filter of the task that takes from an answer what our metric takes, and `THEIRS` is
the filter of lm-evaluation-harness's own task `gsm8k`."""
NUMBER = (
    r"(?:(?<![\w.,%)\]}])-)?\$?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+)?"
)
FIRST_MARKED_OR_LAST = rf"####[ \t]*({NUMBER})(?s:.*)|({NUMBER})"
"""The last match is a marked number, which swallows what comes after it, or the last number."""
STOP = ["Question:", "</s>", "<|im_end|>"]
"""As lm-evaluation-harness's own task `gsm8k` has it."""
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
            # As in its `gsm8k`, but for the zeros: it compares texts, and we compare numbers.
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.0*$"],
        }
    ],
}
PROMPT = "Question: {input}\nAnswer:"
SAMPLING = {"temperature": 0.0, "max_tokens": 64, "stop": STOP, "seed": 1234}
"""What lm-evaluation-harness sends for `TASK`."""


def measure(options: Options) -> Iterator[str]:
    """One line for requests, two for marks of recorded answers, one for live ones."""
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
    yield f"PARITY ... marked by its own filter {THEIRS}: {agreement(theirs, ours, THEIRS)}"
    yield f"PARITY live answers: {agreement(theirs, live, OURS)}"


def labelled(data: Path | None, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows at most, of distinct `question` and its `answer`, which ends in `#### <number>`.

    From a JSONL file in shuffled order, or made up.
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
    """What `validate` makes of the rows in a flow, and how long it took there."""
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
    marked = marked_by_question(lake, found.dataset_table, model.identifier, found.run)
    in_order = [marked[row["question"]] for row in rows]
    return Outcome(seconds, report.metric_values[DATASET], {OURS: in_order})


def marked_by_question(lake: Path, dataset: str, model: str, run: str) -> dict[str, Marked]:
    """What is in the tables of the lake."""
    from vllm_tasks.metrics.numeric_match import number_in

    select = f"""
        SELECT asked.input, said.output, scores.score FROM "{dataset}" AS asked
        JOIN "_outputs__{model}-on-{DATASET}" AS said ON said."row" = asked."row" AND said.run = '{run}'
        JOIN _metric_scores AS scores ON scores."row" = asked."row" AND scores.run = '{run}'
    """
    tables = Datalayer(url=str(lake)).tables()  # type: ignore[arg-type]  # made a secret
    try:
        found = [dict(row) for batch in tables.read(select) for row in batch]
    finally:
        tables.close()
    marked = {}
    for row in found:
        (question,) = json.loads(row["input"])
        extracted = number_in(row["output"])
        marked[question] = Marked(row["output"], "" if extracted is None else str(extracted), row["score"])
    return marked


def agreement(theirs: Outcome, ours: Outcome, name: str) -> str:
    """Rows with equal answers, numbers and scores, of all that `name` took from theirs."""
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
    """The number that a marker took from an answer, however it spells it; None when it took none."""
    try:
        return Decimal(extracted.replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
