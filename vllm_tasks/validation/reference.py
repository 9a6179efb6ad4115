"""Reference sets: small data sets in the package, each with all that a model needs to be validated on it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

from vllm_tasks.calls.classes import Classes
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.sets import ReferenceName, rows_of

GREEDY = {"temperature": 0, "max_tokens": 256}
FIELDS: dict[ReferenceName, dict[str, Any]] = {
    "arithmetic": {
        "prompt": "{input}\n\nCalculate in a few short steps. Then end with the answer, one number without a "
        "unit, after four hash signs, such as: #### 12",
        "predict_kwargs": GREEDY,
    },
    "classification": {
        "prompt": "A shop received this message:\n\n{input}\n\nWhat is the message about?",
        "datatype": Classes(
            {
                "billing": "an invoice, a payment, or an amount that was charged",
                "delivery": "where a parcel is, or when and to where it comes",
                "return": "to send an article back or to exchange it, because it is not wanted",
                "account": "the login, the password, or the customer's profile",
                "defect": "an article that is broken or does not work",
                "advice": "a question about an article before it is bought",
            }
        ),
    },
    "extraction": {
        "prompt": "{input}\n\nWrite the order in the text above as JSON with these fields: customer (first "
        "and last name), city (where it is delivered to), item (as it is written in the text), quantity, "
        "unit_price (in euros), delivery_date (as YYYY-MM-DD), gift (true or false).",
        "output_schema": {
            "customer": "str",
            "city": "str",
            "item": "str",
            "quantity": "int",
            "unit_price": "float",
            "delivery_date": "str",
            "gift": "bool",
        },
        "predict_kwargs": GREEDY,
    },
    "retrieval": {"task": "embed"},
}
"""What a model is for each set."""
KEYS: dict[ReferenceName, tuple[str, str]] = {
    "arithmetic": ("question", "answer"),
    "classification": ("text", "label"),
    "extraction": ("text", "answer"),
    "retrieval": ("text", "target"),
}
METRICS: dict[ReferenceName, tuple[str, ...]] = {
    "arithmetic": ("numeric_match", "output_tokens"),
    "classification": ("accuracy", "macro_f1", "log_loss", "brier", "expected_calibration_error"),
    "extraction": ("json_fields", "json_valid"),
    "retrieval": ("recall_at_k", "ndcg_at_k"),
}


@dataclass(frozen=True)
class ReferenceSet:
    """A reference set: what a model must be for it, and the validation.

    The set is used as

        found = reference_set("extraction")
        VllmAPI(identifier="llama", api_url=..., **found.fields).validate(found.validation, db="data")
    """

    name: ReferenceName
    fields: dict[str, Any]
    """Fields of a `VllmAPI` or `VllmModel`: prompt, datatype or schema, task, sampling parameters."""
    validation: Validation
    """The data set, the metrics and the key, without limits."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, with the columns `topic` and `level` besides the key's."""
        return rows_of(self.name)


def reference_set(name: ReferenceName, *, sample_size: int | None = None) -> ReferenceSet:
    """Return a reference set: a small data set in the package, with known answers, prompt and metrics.

    Args:
        name: "arithmetic", "classification", "extraction" or "retrieval".
        sample_size: How many of the 240 rows are drawn, the same ones in every run; None: all. "retrieval"
            takes all, because a sample lacks documents.

    Returns:
        The set, whose `fields` go into a model, and whose `validation` goes into its `validate`.

    Raises:
        InvalidCall: There is no such set.
    """
    if name not in FIELDS:
        known = get_args(ReferenceName)
        raise InvalidCall(
            f"there is no reference set {name!r:.100}{near(str(name), known)}; there are {', '.join(known)}"
        )
    return ReferenceSet(
        name,
        deepcopy(FIELDS[name]),
        Validation(
            datasets=[Dataset(identifier=name, reference=name, sample_size=sample_size)],
            metrics=[Metric(identifier=metric) for metric in METRICS[name]],
            key=KEYS[name],
        ),
    )
