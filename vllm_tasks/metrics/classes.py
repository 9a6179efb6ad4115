"""Classes that answers and targets name, regardless of case and of white space around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics.text import accepted, text_of


class Label(str):
    """The class that an answer names, as a text, with the probabilities of all classes."""

    probabilities: Mapping[str, float] = {}

    @classmethod
    def of(cls, name: str, probabilities: Mapping[str, float]) -> Label:
        """Return the label of an answer."""
        label = cls(name)
        label.probabilities = probabilities
        return label


def probabilities_of(prediction: Any, metric: str) -> dict[str, float]:
    """Return the probabilities of an answer by class, stripped and case-folded.

    Raises `InvalidCall` for an answer without them.
    """
    if not isinstance(prediction, Label):
        raise InvalidCall(
            f"{metric} needs the probabilities of classes, and the answer {prediction!r:.100} has none: give "
            "the model datatype=Classes([...])"
        )
    return {name.strip().casefold(): p for name, p in prediction.probabilities.items()}


def class_of(prediction: Any, metric: str) -> str:
    """Return the class that an answer names: its text or `label`, stripped and case-folded."""
    if isinstance(prediction, Mapping) and isinstance(prediction.get("label"), str):
        prediction = prediction["label"]
    return text_of(prediction, metric).strip().casefold()


def known_classes(labels: Sequence[Any] | None, metric: str) -> dict[str, str] | None:
    """Return the option `labels` by class, or None without it. Raise `InvalidCall` for a repeated class."""
    if labels is None:
        return None
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
        raise InvalidCall(
            f"{metric}: labels must be a list of classes such as ['yes', 'no'], not {labels!r:.100}"
        )
    known = spelled(label for given in labels for label in accepted([given], metric))
    if len(known) < len(labels):
        raise InvalidCall(f"{metric}: labels has a class twice (case is ignored): {labels!r:.200}")
    return known


def target_class(target: Any, known: dict[str, str] | None, metric: str) -> str:
    """Return a target as written, but stripped. Raise `InvalidCall` for a list and for an unknown class."""
    if isinstance(target, list):
        raise InvalidCall(
            f"{metric} takes one class as target, not {target!r:.100}: exact_match takes several"
        )
    (written,) = accepted(target, metric)
    if known is not None and written.strip().casefold() not in known:
        labels = list(known.values())
        raise InvalidCall(
            f"{metric}: the target {written!r:.100} is none of the labels "
            f"{labels!r:.200}{near(written, labels)}"
        )
    return written.strip()


def spelled(labels: Iterable[str]) -> dict[str, str]:
    """Map each class to its spelling: the first in character order, whatever the order of the rows."""
    ways: dict[str, str] = {}
    for label in sorted({label.strip() for label in labels}):
        ways.setdefault(label.casefold(), label)
    return ways
