"""Labels that people give to outputs: kept in a table of their own, and preferred when outputs are read.

A label belongs to a key and to the input that the person saw (`_input_hash`). So no run removes it, and it
does not apply to a row that has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.datalayer.selection import CLASS_COLUMNS, REVIEW
from vllm_tasks.errors import InvalidCall, near

LABEL, PROBABILITY, PROBABILITIES = (column.name for column in CLASS_COLUMNS)
HASH, AT = "_input_hash", "_reviewed_at"
TIME = pa.timestamp("us", "UTC")
WHOLE = pa.int64()


def key_of(outputs: pa.Table) -> list[str]:
    """The columns of the key, which stand before those of the answer."""
    names: list[str] = outputs.column_names
    return names[: names.index(LABEL)]


def preferred(outputs: pa.Table, given: pa.Table | None) -> pa.Table:
    """The outputs with the labels that people gave, and the time of each in `_reviewed_at`."""
    if given is None:
        return outputs.append_column(AT, pa.nulls(outputs.num_rows, TIME))
    labels: list[str | None] = [None] * outputs.num_rows
    times: list[datetime | None] = [None] * outputs.num_rows
    key = [*key_of(outputs), HASH]
    by_key = {tuple(row[name] for name in key): row for row in given.to_pylist()}
    # Only rows whose input a person has seen become Python values.
    places = pc.indices_nonzero(pc.is_in(outputs[HASH], given[HASH].combine_chunks()))
    for place, row in zip(places.to_pylist(), outputs.select(key).take(places).to_pylist(), strict=True):
        if (found := by_key.get(tuple(row.values()))) is not None:
            labels[place], times[place] = found[LABEL], found[AT]
    at = pa.array(times, TIME)
    reviewed = at.is_valid()
    people = pc.if_else(reviewed, pa.array(labels, outputs.schema.field(LABEL).type), outputs[LABEL])
    waiting = pc.if_else(reviewed, pa.scalar(False), outputs[REVIEW])
    for name, column in ((LABEL, people), (REVIEW, waiting)):
        outputs = outputs.set_column(outputs.column_names.index(name), name, column)
    return outputs.append_column(AT, at)


def waiting(outputs: pa.Table, predict_id: str) -> pa.Table:
    """The rows for a person, the least probable label first."""
    _refuse_unmarked(outputs, predict_id)
    return outputs.filter(pc.equal(outputs[REVIEW], True)).sort_by(PROBABILITY)


def answered(outputs: pa.Table, labels: Mapping[Any, str], predict_id: str) -> pa.Table:
    """The rows to keep of the labels that a person gave by key.

    Raises `InvalidCall` for a key without an output or of another type, and for a label that is not a class.
    """
    _refuse_unmarked(outputs, predict_id)
    if not isinstance(labels, Mapping):
        raise InvalidCall(
            f"labels is a {type(labels).__name__}: give a mapping of keys to labels, {{7: 'yes'}}"
        )
    key = key_of(outputs)
    wanted = {each if isinstance(each, tuple) else (each,): label for each, label in labels.items()}
    kind = outputs.schema.field(key[0]).type
    try:
        first = pa.array([next(iter(each), None) for each in wanted], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as e:
        raise InvalidCall(
            f"the key {key[0]!r} of {predict_id!r} is of the type {kind}, and a label has another one: "
            f"{e}; give the keys as `outputs` returns them"
        ) from e
    near_them = outputs.filter(pc.is_in(outputs[key[0]], first)).to_pylist()
    there = {tuple(row[name] for name in key): row for row in near_them if row["_error"] is None}
    for each, label in wanted.items():
        if each not in there:
            raise InvalidCall(
                f"{predict_id!r} has no output with the key {each[0] if len(each) == 1 else each!r}: a "
                "person can answer rows that have an output"
            )
        classes = list(json.loads(there[each][PROBABILITIES]))
        if label not in classes:
            raise InvalidCall(
                f"{label!r:.100} is none of the classes {classes!r:.300}{near(str(label), classes)}"
            )
    return pa.table(
        {
            **{name: _array([each[i] for each in wanted], outputs, name) for i, name in enumerate(key)},
            LABEL: pa.array(wanted.values(), pa.string()),
            HASH: pa.array([there[each][HASH] for each in wanted], pa.string()),
            AT: pa.array([datetime.now(UTC)] * len(wanted), TIME),
        }
    )


def _array(values: Sequence[Any], outputs: pa.Table, name: str) -> pa.Array:
    """Values of a key in the type that `Tables.put` takes for whole numbers and texts of any width."""
    kind = outputs.schema.field(name).type
    wide = WHOLE if pa.types.is_integer(kind) else pa.string() if pa.types.is_large_string(kind) else kind
    return pa.array(values, wide)


def _refuse_unmarked(outputs: pa.Table, predict_id: str) -> None:
    if REVIEW not in outputs.column_names:
        raise InvalidCall(
            f"the outputs {predict_id!r} have no column {REVIEW!r}: give the model datatype=Classes(..., "
            "review_below=0.8)"
        )
