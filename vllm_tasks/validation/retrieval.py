"""Rankings made of vectors: what `recall_at_k` and `ndcg_at_k` score of a model with `task="embed"`.

The documents are rows of the data set, too. The target of a document is its id, and the target of a query
has the ids of the documents that are relevant to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.data import data_of
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.metrics.rankings import LENGTH, gains_of, id_of
from vllm_tasks.validation.metric import Metric

RANKED = "recall_at_k", "ndcg_at_k"
"""Built-in metrics of rankings."""


def ranked(metric: Metric, answers: Sequence[Answer]) -> list[Answer]:
    """Put rankings in place of the vectors of queries, and leave out documents.

    A ranking has the ids of the `k` documents whose vectors have the largest cosine with the query's. A
    document that failed is not found. Answers stay as they are if there are no documents, or if the metric is
    not one of rankings.
    """
    if metric.built_in not in RANKED:
        return list(answers)
    queries = [answer for answer in answers if not is_document(answer.target)]
    documents = [answer for answer in answers if is_document(answer.target)]
    if not documents:
        return queries
    there = [document for document in documents if document.prediction is not None]
    ids = [id_of(document.target) for document in there]
    matrix = _unit([document.prediction for document in there])

    def ranking(vector: Sequence[float]) -> list[str]:
        cosines = matrix @ _unit([vector])[0] if ids else np.empty(0)
        best = np.argsort(-cosines, kind="stable")[: _k(metric)]
        return [ids[place] for place in best]

    return [q if q.prediction is None else replace(q, prediction=ranking(q.prediction)) for q in queries]


def is_document(target: Any) -> bool:
    """Return whether the target is one id, not a list of ids or an object of gains."""
    return not isinstance(data_of(target), list | Mapping)


def check_documents(metric: Metric, targets: Sequence[Any]) -> None:
    """Raise `InvalidCall` for targets by which vectors cannot be ranked."""
    ids = Counter(id_of(target) for target in targets if is_document(target))
    queries = [target for target in targets if not is_document(target)]
    what = f"the metric {metric.identifier!r}"
    if metric.extract:
        raise InvalidCall(f"{what} has extract, which takes texts, and the answers are vectors: leave it out")
    if not ids or not queries:
        raise InvalidCall(
            f"{what} ranks documents by the vectors of the model, and the data set has {len(queries)} "
            f"queries and {sum(ids.values())} documents: add documents as rows whose target is their "
            "own id, and queries as rows whose target is a list of ids"
        )
    if twice := [name for name, count in ids.items() if count > 1]:
        raise InvalidCall(f"{what}: two documents have the id {twice[0]!r:.100}; give each one of its own")
    for target in queries:
        for name in gains_of(target, _k(metric), metric.identifier):
            if name not in ids:
                raise InvalidCall(
                    f"{what}: {name!r:.100} is relevant to a query but is not a document of the data set"
                    f"{near(name, ids)}; add it, or take all rows, since a sample lacks documents"
                )


def _k(metric: Metric) -> int:
    found: int = metric.options.get("k", LENGTH)
    return found


def _unit(vectors: Sequence[Sequence[float]]) -> Any:
    """Vectors of length 1, as rows; a vector of zeros stays one."""
    rows = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
